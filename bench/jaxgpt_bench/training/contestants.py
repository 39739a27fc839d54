"""Who is measured by `jaxgpt-bench train`: this trainer, its variants, PyTorch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import torch

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError, nearest
from jaxgpt.training.devices.precision import best_precision, compute_capability
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.optimizers import check_optimizer
from jaxgpt.training.options import model_config, train_config
from jaxgpt_bench.training.options import TrainingOptions
from jaxgpt_bench.training.trainer import Trainer
from jaxgpt_bench.training.variants import Variant, parse_variants

PYTORCH_OPTIMIZER = "adamw"
TUNINGS = ("plain", "tuned", "max-autotune")  # of pytorch_trainer.py
DEFAULT_TUNINGS = ("plain", "tuned")  # where none is asked for


def first_settings(options: TrainingOptions) -> Variant:
    """Return what the first row is trained with."""
    train = train_config(options.training)
    if "precision" not in options.given:
        train = dataclasses.replace(train, precision=best_precision())
    check_optimizer(train.optimizer)
    return Variant("", model_config(options.model), train)


def all_variants(options: TrainingOptions, first: Variant) -> list[Variant]:
    """Return the variants that were asked for; and, beside PyTorch, one with its optimizer."""
    found = parse_variants(options.variant, first)
    like_pytorch = f"optimizer={PYTORCH_OPTIMIZER}"
    compared = [each for each in (first, *found) if each.train.optimizer == PYTORCH_OPTIMIZER]
    if not options.alone and not compared:
        train = dataclasses.replace(first.train, optimizer=PYTORCH_OPTIMIZER)
        found.insert(0, dataclasses.replace(first, name=like_pytorch, train=train))
    return found


def check(options: TrainingOptions, variants: Sequence[Variant], platform: str) -> None:
    """Raise UserError for devices that are not there, or over which a batch does not divide."""
    if platform == "gpu" and max(options.devices) > jax.device_count():
        raise UserError(f"--devices {max(options.devices)}: there are {jax.device_count()} GPUs")
    if platform == "gpu" and not options.alone and not torch.cuda.is_available():
        raise UserError("JAX sees a GPU, PyTorch does not: install its CUDA build, or give --alone")
    model = variants[0].model
    if not options.alone and (model.qat or not model.tied or model.positions != "learned" or model.drops):
        raise UserError(
            "transformers' GPT-2 has neither qat nor rotary positions nor a head of its own, and is measured "
            "without dropout; leave those options out, or PyTorch by --alone"
        )
    if options.alone and options.pytorch:
        raise UserError("--alone leaves PyTorch out, --pytorch chooses among its rows; give one of them")
    for name in options.pytorch:
        if name not in TUNINGS:
            raise UserError(f"--pytorch {name}: expected some of them; {nearest(name, TUNINGS)}")
    for each in variants:
        where = jax.default_backend(), compute_capability()
        numerics, reason = choose_numerics(each.model, each.train, *where)
        if each.flash and not numerics.flash:
            raise UserError(f"--variant {each.name}: {reason}; leave flash out")
    for each in variants if platform == "cpu" else ():
        micro = each.train.batch_size // each.train.grad_accum_steps
        for devices in options.devices if not each.name else options.devices[:1]:
            if micro % devices:
                raise UserError(
                    f"{f'--variant {each.name}: ' if each.name else ''}a micro-batch of {micro} sequences "
                    f"(batch_size / grad_accum_steps) does not divide over {devices} devices; "
                    "choose another --batch-size or --devices"
                )


def line_up(
    options: TrainingOptions,
    variants: Sequence[Variant],
    platform: str,
    weights: Callable[[ModelConfig], Path],
) -> list[Trainer]:
    """List who is measured: the first variant on every number of devices, the others on the first, PyTorch.

    Args:
      options: of the command.
      variants: the first one is that which others are compared with.
      platform: cpu or gpu.
      weights: returns a file with the weights of a shape.
    """

    def trainer(engine: str, devices: int, variant: Variant, name: str) -> Trainer:
        batch = variant.train.batch_size * (devices if platform == "gpu" else 1)
        train = dataclasses.replace(variant.train, batch_size=batch)
        path = str(weights(variant.model))
        how = (name, variant.flash, variant.xla_flags) if engine == "jaxgpt" else (name,)
        return Trainer(engine, devices, platform, variant.model, train, path, *how)

    first, *others = variants
    found = [trainer("jaxgpt", devices, first, "") for devices in options.devices]
    found += [trainer("jaxgpt", options.devices[0], each, each.name) for each in others]
    if not options.alone:
        tunings = options.pytorch or DEFAULT_TUNINGS
        found += [trainer("pytorch", 1, first, "" if name == "plain" else name) for name in tunings]
    return found
