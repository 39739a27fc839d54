"""Validation loss of a run over the whole split.

    jaxgpt evaluate --run RUN

Nats per token over non-overlapping windows of block_size (so early positions have little context), and
bits per byte: the same nats over the UTF-8 bytes of the documents, which compares across tokenizers.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import Dataset, open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.training.batches import IGNORED
from jaxgpt.training.devices.mesh import batch_sharding, make_mesh, use_cpu_devices
from jaxgpt.training.model.params import Params, graph_of
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import check_tokenizer, open_run
from jaxgpt.training.step.train_step import make_eval_step

EvalStep = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's validation loss over the whole validation split.

    Attributes:
      run: the run folder.
      data: dataset folder; the run's own if not given.
      step: best, latest, or a stored step.
      batch_size: sequences at a time.
      cpu_devices: simulate so many devices on the CPU; 0 takes the devices that JAX finds.
      json: print one JSON document with all figures on stdout.
    """

    run: Path
    data: Path | None = None
    step: str = "best"
    batch_size: int = 8
    cpu_devices: int = 0
    json: bool = False


def validation_loss(
    eval_step: EvalStep, params: Params, dataset: Dataset, block_size: int, batch_size: int, mesh: Mesh
) -> dict[str, float]:
    """Measure the loss over the whole validation split.

    Args:
      eval_step: compiled `steps.make_eval_step`.
      params: parameters.
      dataset: whose validation split is taken.
      block_size: T.
      batch_size: sequences at a time; rounded up to the number of devices.
      mesh: over which they are split.

    Returns:
      val_loss (nats per token) and val_bits_per_byte.

    Raises:
      UserError: the split has no full window.
    """
    inputs, targets = windows(dataset.val, block_size)
    devices = mesh.size
    rows = -(-min(batch_size, len(inputs)) // devices) * devices
    missing = -len(inputs) % rows
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=IGNORED)
    sharding = batch_sharding(mesh, axis=0, ndim=2)
    total, count = 0.0, 0
    for start in range(0, len(inputs), rows):
        part = slice(start, start + rows)
        parts = [
            jax.make_array_from_callback((rows, block_size), sharding, array[part].__getitem__)
            for array in (inputs, targets)
        ]
        loss, positions = eval_step(params, *parts)
        total += float(loss)
        count += int(positions)
    return {
        "val_loss": total / count,
        "val_bits_per_byte": total / math.log(2) / dataset.val_bytes,
    }


def evaluate(options: EvaluateOptions) -> Result:
    """Run `jaxgpt evaluate`."""
    if options.batch_size < 1:
        raise UserError(f"batch_size ({options.batch_size}) must be at least 1")
    use_cpu_devices(options.cpu_devices)
    jax.config.update("jax_default_matmul_precision", "highest")
    run = open_run(options.run)
    dataset = open_dataset(options.data or Path(run.config.data["folder"]))
    check_tokenizer(run.config, dataset)
    model = run.config.model
    step, params = load_params(run, options.step)
    mesh = make_mesh("", options.cpu_devices)
    placed = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    eval_step = jax.jit(make_eval_step(graph_of(model)))
    figures: dict[str, Any] = {
        "step": step,
        "val_tokens": len(dataset.val) - 1,
        "val_bytes": dataset.val_bytes,
    }
    figures |= validation_loss(eval_step, placed, dataset, model.block_size, options.batch_size, mesh)
    if not math.isfinite(figures["val_loss"]):
        raise UserError(
            f"the validation loss of {options.run} step {step} is not finite; take another --step"
        )
    say(
        f"{options.run} step {step}: {figures['val_loss']:.4f} nats/token, "
        f"{figures['val_bits_per_byte']:.4f} bits/byte over {figures['val_tokens']:,} tokens "
        f"({figures['val_bytes']:,} bytes) of {dataset.folder}"
    )
    return Result(figures)
