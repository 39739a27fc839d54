"""The probe of an artifact: tokens, and the logits that the source of its weights gave for some positions.

    tokens      (B, T) int32     text of the run's validation split
    positions   (P,) int32       flat positions b T + t whose logits are kept
    logits      (P, V) float32   Flax, float32, of the run's checkpoint

So the distance of an artifact from its run is measured anew without JAX. No PyTorch here.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import Tokens, count_windows, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tensor_file import read_tensor_file, write_tensor_file

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.certificate import require_certificate

PROBE_SEQUENCES = 4
MAX_PROBE_BYTES = 8_000_000  # a GPT-2 vocabulary takes 0.2 MB a position
# At most a quarter of the float32 weights, or this where they are tiny: a small model stays a small folder.
MAX_PROBE_SHARE, SMALL_PROBE_BYTES = 4, 500_000
FIELDS = ("tokens", "positions", "logits")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens with the logits that the source gave for them; shapes in the module's docstring."""

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]


def probe_tokens(val: Tokens, block_size: int) -> npt.NDArray[np.int32]:
    """Choose windows (B, T) of the validation split, evenly spread; at most 4."""
    count_windows(val, block_size)  # refuses a split without a full one
    full = (len(val) - 1) // block_size
    chosen = np.linspace(0, full - 1, min(PROBE_SEQUENCES, full)).round().astype(int)
    return np.concatenate([windows(val, block_size, None, at, at + 1)[0] for at in chosen.tolist()])


def probe_positions(tokens: int, config: ModelConfig) -> npt.NDArray[np.int32]:
    """Choose flat positions (P,), evenly spread with first and last, whose logits fit into a probe."""
    weight_bytes = 4 * sum(math.prod(each.shape) for each in parameters(config))
    small = max(weight_bytes // MAX_PROBE_SHARE, SMALL_PROBE_BYTES)
    count = max(min(tokens, min(MAX_PROBE_BYTES, small) // (4 * config.vocab_size)), 2)
    # From both ends in float32, as torch.linspace does: the positions of artifacts stay what they were.
    spacing = np.float32(tokens - 1) / np.float32(count - 1)
    places = np.arange(count, dtype=np.float32)
    from_end = np.float32(tokens - 1) - spacing * places[::-1]
    return np.where(np.arange(count) < count // 2, spacing * places, from_end).round().astype(np.int32)


def write_probe(folder: Path, probe: Probe) -> None:
    """Write probe.safetensors."""
    write_tensor_file(folder / "probe.safetensors", {name: getattr(probe, name) for name in FIELDS})


def read_probe(artifact: Artifact) -> Probe:
    """Read probe.safetensors; UserError when it is missing, damaged or of another model."""
    path = artifact.folder / "probe.safetensors"
    if not path.exists():
        require_certificate(artifact.folder)
        raise UserError(f"{path} is missing; convert the run again")
    try:
        fields = read_tensor_file(path)
        probe = Probe(*(fields[name] for name in FIELDS))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the run again") from None
    _check_probe(probe, artifact.config, path)
    return probe


def _check_probe(probe: Probe, config: ModelConfig, path: Path) -> None:
    """Raise UserError unless a probe's shapes and values are those of a model."""
    tokens, positions, logits = probe.tokens, probe.positions, probe.logits
    if tokens.ndim != 2 or positions.ndim != 1 or logits.shape != (len(positions), config.vocab_size):
        raise UserError(f"{path} belongs to another model; convert the run again")
    if not tokens.dtype == positions.dtype == np.int32 or logits.dtype != np.float32:
        raise UserError(f"{path} is damaged: its tensors are of other types; convert the run again")
    fits = (
        tokens.shape[1] <= config.block_size
        and tokens.size
        and len(positions)
        and 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size
        and 0 <= int(positions.min()) <= int(positions.max()) < tokens.size
        and bool((np.diff(positions) >= 0).all())
        and bool(np.isfinite(logits).all())
    )
    if not fits:
        raise UserError(f"{path} is damaged or belongs to another model; convert the run again")
