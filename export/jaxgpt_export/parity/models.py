"""What can be compared: run folders, artifacts, Hugging Face folders, modules, with their layers in sight."""

from pathlib import Path
from typing import cast

import torch
from jaxgpt.shared.errors import UserError
from safetensors import SafetensorError
from torch import nn

from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.model.build import build_model
from jaxgpt_export.parity.comparable import Comparable
from jaxgpt_export.parity.module_model import ModuleModel


def open_model(subject: str | Path | nn.Module) -> Comparable:
    """Open whatever can be compared.

    Args:
      subject: a run folder (its best checkpoint, computed by Flax), an artifact, another Hugging Face GPT-2
        folder (computed by transformers, which has to be installed), or a module.

    Raises:
      UserError: the folder is none of these.
    """
    if isinstance(subject, nn.Module):
        return ModuleModel(subject, type(subject).__name__)
    folder = Path(subject)
    if (folder / "checkpoints").is_dir():
        from jaxgpt_export.flax_run.comparable import FlaxModel  # the only module that knows JAX

        return FlaxModel(folder)
    if (folder / "certificate.json").exists():
        artifact = read_artifact(folder)
        # Smoothing is folded into norms and value columns, which then differ on purpose.
        folded = artifact.quantization is not None and artifact.quantization.rounds_inputs
        return ModuleModel(build_model(artifact), str(folder), folded=folded)
    if (folder / "config.json").exists():
        return ModuleModel(_from_transformers(folder), str(folder))
    raise UserError(
        f"{folder} is no run folder, artifact or Hugging Face folder; expected checkpoints/, "
        "certificate.json or config.json in it"
    )


def _from_transformers(folder: Path) -> nn.Module:
    import transformers  # an option: only folders of others need it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"transformers can't load {folder} ({line})") from None
    # transformers fills what is missing with random numbers and leaves out what it does not know
    wrong = [
        f"{kind} tensors: {', '.join(sorted(map(str, found[f'{kind}_keys'])))}"
        for kind in ("missing", "unexpected", "mismatched")
        if found[f"{kind}_keys"]
    ]
    if wrong:
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(wrong)[:400]}")
    return cast(nn.Module, model)
