"""What can be compared: run folders, artifacts, Hugging Face folders, modules, with their layers in sight."""

from pathlib import Path
from typing import Any, cast

import torch
from jaxgpt.shared.architecture import HF_PREFIX
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json
from jaxgpt.shared.huggingface import MODEL_TYPE, check_field_types, is_unused
from jaxgpt.shared.tokenizer import load_tokenizer
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
        return ModuleModel(transformers_model(folder), str(folder))
    raise UserError(
        f"{folder} is no run folder, artifact or Hugging Face folder; expected checkpoints/, "
        "certificate.json or config.json in it"
    )


def require_tokenizer(dataset: Dataset, *folders: Path) -> None:
    """Check that a data set's tokens are those of runs and artifacts; of other folders nothing tells it.

    Raises:
      UserError: a model has another tokenizer.
    """
    for folder in folders:
        sha256 = None
        if (folder / "checkpoints").is_dir():
            with damaged(folder / "config.json", "it is no run's"):
                sha256 = read_json(folder / "config.json", "run")["data"]["tokenizer"]["sha256"]
        elif (folder / "certificate.json").exists():
            sha256 = load_tokenizer(folder).sha256
        if sha256 not in (None, dataset.tokenizer_sha256):
            raise UserError(
                f"{dataset.folder} was made with another tokenizer ({dataset.tokenizer_sha256[:12]}...) than "
                f"{folder} ({sha256[:12]}...); give the data set that the model was trained on"
            )


def transformers_model(folder: Path) -> nn.Module:
    """Return transformers' reading of a Hugging Face folder, in float32; it has to be installed.

    Raises:
      UserError: transformers can't load it, or would fill up or leave out tensors of the language model.
    """
    import transformers  # an option: only folders of others need it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    value = read_json(folder / "config.json", "model configuration")
    kind: Any = transformers.AutoModelForCausalLM
    if value.get("model_type", MODEL_TYPE) == MODEL_TYPE:  # transformers' own classes need no model_type
        check_field_types(value, folder / "config.json")
        kind = transformers.GPT2LMHeadModel
    try:
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # its checks of config.json raise classes of their own
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"transformers can't load {folder} ({line}); fetch it again") from None
    # transformers fills what is missing with random numbers and leaves out what it does not know
    names = {
        each: sorted(map(str, found[f"{each}_keys"])) for each in ("missing", "unexpected", "mismatched")
    }
    names["unexpected"] = [
        name for name in names["unexpected"] if not is_unused(name.removeprefix(HF_PREFIX))
    ]
    if wrong := [f"{each} tensors: {', '.join(listed)}" for each, listed in names.items() if listed]:
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(wrong)[:400]}")
    return cast(nn.Module, model.eval())
