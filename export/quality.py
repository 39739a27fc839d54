"""What a change of a model costs: loss and distance from a reference on identical tokens."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from export.parity import Parity, ParityMeter

Int32Array = npt.NDArray[np.int32]
# Gives the logits (B, T, V) of tokens (B, T).
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model on a text.

    Attributes:
      loss: cross entropy, nats per token.
      tokens: number of tokens predicted.
      parity: distance from the reference; None for the reference itself.
    """

    loss: float
    tokens: int
    parity: Parity | None


def batches(inputs: Int32Array, targets: Int32Array, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows (see `tokens.windows`) as tensors, so many rows at a time."""
    for start in range(0, len(inputs), rows):
        part = slice(start, start + rows)
        yield torch.from_numpy(inputs[part]).long(), torch.from_numpy(targets[part]).long()


@torch.inference_mode()
def measure_quality(
    models: dict[str, Forward], windows: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Quality]:
    """Measure several models on identical tokens; the first is the reference.

    Args:
      models: by name.
      windows: pairs of tokens (B, T) and targets (B, T), targets -1 where nothing is predicted.

    Returns:
      The quality of each model, under its name.
    """
    meters = {name: ParityMeter() for name in models}
    sums = dict.fromkeys(models, 0.0)
    count = 0
    reference_name = next(iter(models))
    for tokens, targets in windows:
        counted = targets >= 0
        count += int(counted.sum())
        reference: Tensor | None = None
        for name, forward in models.items():
            logits = forward(tokens)[counted]
            sums[name] += float(F.cross_entropy(logits.double(), targets[counted], reduction="sum"))
            if reference is None:
                reference = logits
            else:
                meters[name].add(reference, logits)
    return {
        name: Quality(sums[name] / count, count, None if name == reference_name else meters[name].result())
        for name in models
    }
