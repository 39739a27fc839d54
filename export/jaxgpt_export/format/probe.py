"""The probe of an artifact: tokens, and the logits that the source of its weights gave for some positions.

tokens      (B, T) int32     text of the run's validation split
positions   (P,) int32       flat positions b T + t whose logits are kept
logits      (P, V) float32   Flax, float32, of the run's checkpoint
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import windows
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Int32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jaxgpt_export.format.artifact import Artifact

PROBE_SEQUENCES = 4
MAX_PROBE_BYTES = 8_000_000  # a GPT-2 vocabulary takes 0.2 MB a position


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens with the logits that Flax gave for them; shapes in the module's docstring."""

    tokens: Int32[Tensor, "B T"]
    positions: Int32[Tensor, "P"]
    logits: Float[Tensor, "P V"]


def probe_tokens(val: "np.ndarray[Any, np.dtype[np.uint16]]", block_size: int) -> Int32[Tensor, "B T"]:
    """Choose windows of the validation split, evenly spread; at most 4."""
    inputs, targets = windows(val, block_size)
    full = inputs[(targets >= 0).all(axis=1)]
    chosen = np.linspace(0, len(full) - 1, min(PROBE_SEQUENCES, len(full))).round().astype(int)
    return torch.from_numpy(full[chosen])


def probe_positions(tokens: int, vocab_size: int) -> Int32[Tensor, "P"]:
    """Choose flat positions, evenly spread with first and last, whose logits fit into 8 MB."""
    count = max(min(tokens, MAX_PROBE_BYTES // (4 * vocab_size)), 2)
    return torch.linspace(0, tokens - 1, count).round().to(torch.int32)


def write_probe(folder: Path, probe: Probe) -> None:
    """Write probe.safetensors."""
    fields = {name: getattr(probe, name).contiguous() for name in ("tokens", "positions", "logits")}
    save_file(fields, folder / "probe.safetensors")


def read_probe(artifact: Artifact) -> Probe:
    """Read probe.safetensors; UserError when it is missing, damaged or of another model."""
    path = artifact.folder / "probe.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; convert the run again")
    try:
        fields = load_file(path)
        probe = Probe(fields["tokens"], fields["positions"], fields["logits"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the run again") from None
    _check_probe(probe, artifact.config, path)
    return probe


def _check_probe(probe: Probe, config: ModelConfig, path: Path) -> None:
    """Raise UserError unless a probe's shapes and values are those of a model."""
    tokens, positions, logits = probe.tokens, probe.positions, probe.logits
    if tokens.ndim != 2 or positions.ndim != 1 or logits.shape != (len(positions), config.vocab_size):
        raise UserError(f"{path} belongs to another model; convert the run again")
    if (tokens.dtype, positions.dtype, logits.dtype) != (torch.int32, torch.int32, torch.float32):
        raise UserError(f"{path} is damaged: its tensors are of other types; convert the run again")
    fits = (
        tokens.shape[1] <= config.block_size
        and tokens.numel()
        and len(positions)
        and 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size
        and 0 <= int(positions.min()) <= int(positions.max()) < tokens.numel()
        and bool((positions.diff() >= 0).all())
        and bool(torch.isfinite(logits).all())
    )
    if not fits:
        raise UserError(f"{path} is damaged or belongs to another model; convert the run again")
