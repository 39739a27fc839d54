"""What imports end with: the comparison with an independent reading, then the artifact and its evidence."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import new_folder, sha256_of
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer
from torch import Tensor

from jaxgpt_export.format.artifact import write_artifact
from jaxgpt_export.format.certificate import write_certificate
from jaxgpt_export.format.model_card import write_model_card
from jaxgpt_export.format.probe import PROBE_SEQUENCES, Probe, probe_positions, probe_tokens, write_probe
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.model.build import as_tensors, float_model
from jaxgpt_export.parity.probe_gates import compare_rows, fp32_bound

PROBE_TOKENS = 2048  # tokens that are compared: a large model in float64 takes minutes for more

Rows = list[npt.NDArray[np.floating[Any]]]  # logits (T, V) of each row of tokens
Reference = Callable[[Tensor], Tensor]  # tokens (T,) -> logits (T, V)


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A model of another program, in this project's terms.

    Attributes:
      source: the folder or file that it was read from.
      format: of the source: huggingface, nanogpt, llm.c.
      files: that were read, by whose hashes the source is known again.
      config: shape.
      tensors: by module name, matrices (O, I), float32; a tied head is left out.
      tokenizer: of the model.
      provenance: more for the certificate's origin; it may name the source otherwise.
      generation: how its tokens are drawn where nobody says otherwise; see Artifact.
    """

    source: Path
    format: str
    files: list[Path]
    config: ModelConfig
    tensors: Arrays
    tokenizer: Tokenizer
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, int | float] = dataclasses.field(default_factory=dict)


def choose_tokens(
    model: ImportedModel, data: Path | None, tokenizer: str | Path
) -> tuple[npt.NDArray[np.int32], str]:
    """Choose what is compared on: windows of a validation split, else random tokens.

    Args:
      model: whose tokens they are.
      data: dataset folder; None for random ones.
      tokenizer: by which name `jaxgpt prepare` finds the model's tokenizer, for messages.

    Returns:
      Tokens (B, T), B T at most PROBE_TOKENS, and where they are from, in words.

    Raises:
      UserError: the data set was made with another tokenizer.
    """
    T = min(model.config.block_size, PROBE_TOKENS)
    rows = min(max(PROBE_TOKENS // T, 1), PROBE_SEQUENCES)
    if data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (rows, T)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator, dtype=torch.int32)
        return tokens.numpy(), "random tokens"
    dataset = open_dataset(data)
    if dataset.tokenizer_sha256 != model.tokenizer.sha256:
        raise UserError(
            f"{data} was made with another tokenizer ({dataset.tokenizer_sha256[:12]}...) than the model's "
            f"({model.tokenizer.sha256[:12]}...); prepare it with: jaxgpt prepare --tokenizer {tokenizer}"
        )
    return probe_tokens(dataset.val, T)[:rows], f"the validation split of {data}"


def rows_of(reference: Reference, tokens: npt.NDArray[np.int32]) -> Rows:
    """Return the reference logits of each row."""
    return [reference(row).numpy() for row in torch.from_numpy(tokens)]


def _probe(tokens: npt.NDArray[np.int32], reference: Rows, config: ModelConfig) -> Probe:
    """Return tokens (B, T) with the logits of a probe's positions, each taken from its row."""
    T, positions = tokens.shape[1], probe_positions(tokens.size, config)
    kept = [logits[positions[positions // T == row] % T] for row, logits in enumerate(reference)]
    return Probe(tokens, positions, np.concatenate(kept).astype(np.float32))


def certify_and_write(
    model: ImportedModel,
    tokens: npt.NDArray[np.int32],
    reference: Rows,
    against: str,
    versions: dict[str, str],
    out: Path,
    overwrite: bool,
    figures: dict[str, Any],
) -> Result:
    """Compare, and write the artifact when the logits agree.

    Args:
      model: what was read.
      tokens: (B, T), on which it is compared.
      reference: logits of each row, by an independent reading of the source.
      against: what gave them, for the certificate.
      versions: of the packages that took part.
      out: artifact folder.
      overwrite: replace an earlier one.
      figures: more of them for the certificate.

    Returns:
      The certificate; not passed, and no artifact, when the logits differ by more than rounding.
    """
    module = float_model(model.config, as_tensors(model.tensors))
    parity = dataclasses.asdict(compare_rows(module, tokens, reference))
    probe = _probe(tokens, reference, model.config)
    difference, bound = parity["max_abs_logit_diff"], fp32_bound(probe)
    figures = {"parity": {**parity, "positions": tokens.size, "against": against}, **figures}
    if difference > bound:
        say(
            f"FAIL  logits of {model.source} read by this program differ from those of {against} by "
            f"{difference:.2e}, at most {bound:.1e} is allowed; no artifact was written"
        )
        return Result(figures, passed=False)
    origin = {
        "source": str(model.source),
        "format": model.format,
        "source_sha256": {path.name: sha256_of(path) for path in model.files},
        "run": None,
        "step": None,
        "versions": versions,
        **model.provenance,
    }
    with new_folder(out, overwrite, "certificate.json") as folder:
        tensors = to_hf_layout(model.tensors, model.config)
        write_artifact(folder, model.config, None, tensors, model.tokenizer, model.generation)
        write_probe(folder, probe)
        certificate = write_certificate(folder, "fp32", origin, figures)
        write_model_card(folder, model.config, certificate)
        size = (folder / "model.safetensors").stat().st_size
    head = "tied" if model.config.tied else "of its own"
    say(
        f"{out}: {model.config.n_layer} layers, {model.config.n_embd} channels, head {head}, "
        f"{size / 1e6:.2f} MB; against {against} on {tokens.size:,} positions: "
        f"max abs logit difference {difference:.2e}, top-1 agreement {parity['top1_agreement']:.4f}"
    )
    return Result({"size_mb": size / 1e6, **certificate})
