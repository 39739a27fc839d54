"""Validation loss over a whole split, as training records it and `jaxgpt evaluate` prints it."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.shared.dataset import Dataset, count_windows
from jaxgpt.training.batches import IGNORED
from jaxgpt.training.devices.mesh import batch_sharding
from jaxgpt.training.model.params import Params

EvalStep = Callable[..., tuple[jax.Array, jax.Array]]


def validation_loss(
    eval_step: EvalStep, params: Params, dataset: Dataset, block_size: int, batch_size: int, mesh: Mesh
) -> dict[str, float]:
    """Measure the loss over the whole validation split.

    Args:
      eval_step: jitted `make_eval_step` of step/train_step.py.
      params: parameters.
      dataset: whose validation split is taken.
      block_size: T.
      batch_size: sequences at a time; rounded up to a multiple of the number of devices.
      mesh: over which they are split.

    Returns:
      val_loss (nats per token) and val_bits_per_byte.

    Raises:
      UserError: the split has no full window.
    """
    windows, devices = count_windows(dataset.val, block_size), mesh.size
    rows = -(-min(batch_size, windows) // devices) * devices
    sharding = batch_sharding(mesh, axis=0, ndim=2)
    total, count = 0.0, 0
    for start in range(0, windows, rows):
        inputs, targets = dataset.val_windows(block_size, start, start + rows)
        missing = ((0, rows - len(inputs)), (0, 0))
        padded = np.pad(inputs, missing), np.pad(targets, missing, constant_values=IGNORED)
        parts = [
            jax.make_array_from_callback((rows, block_size), sharding, array.__getitem__) for array in padded
        ]
        loss, positions = eval_step(params, *parts)
        total += float(loss)
        count += int(positions)
    return {
        "val_loss": total / count,
        "val_bits_per_byte": total / math.log(2) / dataset.val_bytes,
    }
