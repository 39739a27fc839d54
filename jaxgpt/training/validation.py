"""Validation loss over a split, as training records it and `jaxgpt evaluate` prints it."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from jaxgpt.shared.dataset import Dataset, count_windows
from jaxgpt.shared.errors import UserError
from jaxgpt.training.batches import IGNORED
from jaxgpt.training.devices.mesh import batch_sharding
from jaxgpt.training.model.params import Params

EvalStep = Callable[..., tuple[jax.Array, jax.Array]]


def validation_loss(
    eval_step: EvalStep,
    params: Params,
    dataset: Dataset,
    block_size: int,
    batch_size: int,
    mesh: Mesh,
    tokens: int = 0,
) -> dict[str, float]:
    """Measure the loss over the validation split, or over windows that are spread evenly over it.

    Args:
      eval_step: jitted `make_eval_step` of step/train_step.py.
      params: parameters.
      dataset: whose validation split is taken.
      block_size: T.
      batch_size: sequences at a time; rounded up to a multiple of the number of devices.
      mesh: over which they are split.
      tokens: of the split at most, in whole windows (one at least); 0 for all.

    Returns:
      val_loss (nats per token) and val_bits_per_byte; a part of the split has as many bytes as its share of
      the tokens.

    Raises:
      UserError: the split has no full window, or the loss counts no token of the windows.
    """
    windows, devices = count_windows(dataset.val, block_size), mesh.size
    taken = min(windows, max(tokens // block_size, 1)) if tokens else windows
    chosen = [place * windows // taken for place in range(taken)]
    rows = -(-min(batch_size, taken) // devices) * devices
    sharding = batch_sharding(mesh, axis=0, ndim=2)
    total, count = 0.0, 0
    for start in range(0, taken, rows):
        inputs, targets = _windows(dataset, block_size, chosen[start : start + rows])
        missing = ((0, rows - len(inputs)), (0, 0))
        padded = np.pad(inputs, missing), np.pad(targets, missing, constant_values=IGNORED)
        parts = [
            jax.make_array_from_callback((rows, block_size), sharding, array.__getitem__) for array in padded
        ]
        loss, positions = eval_step(params, *parts)
        total += float(loss)
        count += int(positions)
    if not count:
        raise UserError(
            f"of {taken} windows of {block_size} tokens the loss counts no token, all are prompts; "
            "raise --eval-tokens"
        )
    size = float(dataset.val_bytes)
    if taken < windows:
        size *= count / dataset.val_targets
    return {"val_loss": total / count, "val_bits_per_byte": total / math.log(2) / size}


def _windows(
    dataset: Dataset, block_size: int, chosen: Sequence[int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return inputs (W, T) and targets (W, T) of the chosen windows, which are in order."""
    first, last = chosen[0], chosen[-1]
    if last - first == len(chosen) - 1:
        return dataset.val_windows(block_size, first, last + 1)
    inputs, targets = zip(*(dataset.val_windows(block_size, each, each + 1) for each in chosen), strict=True)
    return np.concatenate(inputs), np.concatenate(targets)
