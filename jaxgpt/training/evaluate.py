"""`jaxgpt evaluate`: validation loss of a run over the whole split.

    jaxgpt evaluate --run RUN

Nats per token over non-overlapping windows of block_size (so early positions have little context), and
bits per byte: the same nats over the UTF-8 bytes of the documents, which compares across tokenizers. Matrix
products are computed in full float32 whatever the device's default is. JAX's settings are left as they were.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError


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


def evaluate(options: EvaluateOptions) -> Result:
    """Run `jaxgpt evaluate`.

    Raises:
      UserError: run, step or data set do not fit, or the loss is not finite.
    """
    import jax

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.training.devices.compilation_cache import compilation_cache
    from jaxgpt.training.devices.mesh import make_mesh, replicated, use_cpu_devices
    from jaxgpt.training.model.params import graph_of
    from jaxgpt.training.run.checkpoints import load_params
    from jaxgpt.training.run.folder import check_same_data, check_tokenizer, open_run
    from jaxgpt.training.step.train_step import make_eval_step
    from jaxgpt.training.validation import validation_loss

    if options.batch_size < 1:
        raise UserError(f"batch_size ({options.batch_size}) must be at least 1")
    use_cpu_devices(options.cpu_devices)
    run = open_run(options.run)
    dataset = open_dataset(options.data or Path(run.config.data["folder"]))
    check_tokenizer(run.config, dataset)
    if options.data is None:
        check_same_data(run.config, dataset)
    model = run.config.model
    mesh = make_mesh("", options.cpu_devices)
    eval_step = jax.jit(make_eval_step(graph_of(model), mesh=mesh))
    with compilation_cache(), jax.default_matmul_precision("highest"):
        step, params = load_params(run, options.step)
        params = jax.device_put(params, replicated(mesh))
        losses = validation_loss(eval_step, params, dataset, model.block_size, options.batch_size, mesh)
    figures: dict[str, Any] = {
        "step": step,
        "val_tokens": dataset.val_targets,
        "val_bytes": dataset.val_bytes,
        **losses,
    }
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
