"""`jaxgpt plan`: how much memory a training takes on each device, before anything is allocated.

    jaxgpt plan gpt2 --mesh data=4 --memory 16GB

Parameters and optimizer state follow from shapes and shardings. What a step needs at its peak is the
compiler's own count: the step is compiled for simulated CPU devices, for the micro-batches that divide the
batch, until the largest that fits is found. A GPU's compiler fuses and orders differently, so leave it some
room. Settings are those of `jaxgpt train`, but for two: micro-batches are what is looked for, and
rematerialization is undone by the CPU's compiler.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from jaxgpt.shared.config import MAX_CPU_DEVICES, TrainConfig
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import allocator_share
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.optimizers import check_optimizer
from jaxgpt.training.options import (
    GPT2_VOCAB_SIZE,
    ModelSettings,
    TrainSettings,
    model_config,
    train_config,
)

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TB": 1e12, "TIB": 2**40}


@dataclasses.dataclass(frozen=True)
class _PlannedSettings(TrainSettings):
    grad_accum_steps: tyro.conf.Suppress[int] = 1
    remat: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what a training takes on each device, and the largest micro-batch that fits.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      mesh: layout of the devices, such as data=4,fsdp=2; its product is their number.
      memory: of one device, such as 16GB; JAX takes 75 % of it, or the share that XLA_CLIENT_MEM_FRACTION
        says.
      json: print one JSON document with all figures on stdout.
      model: the shape of the model.
      training: how it is trained.
      given: names of the settings that were given; the others are the preset's.
    """

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    mesh: str = "data=1"
    memory: str = "16GB"
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    model: ModelSettings
    training: _PlannedSettings
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()

    @classmethod
    def of_preset(cls, name: str) -> Callable[..., "PlanOptions"]:
        """Return the constructor with the settings of a preset as its defaults."""
        preset = find_preset(name)
        train = dataclasses.replace(preset.train, grad_accum_steps=1)
        return functools.partial(
            cls,
            model=ModelSettings(**dataclasses.asdict(preset.model(GPT2_VOCAB_SIZE))),
            training=_PlannedSettings(**dataclasses.asdict(train)),
        )


def parse_memory(text: str) -> float:
    """Return the bytes of "16GB", "15.8 GiB" or "16000MB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"memory {text!r} is no size; expected such as 16GB")
    return float(match[1]) * UNITS[match[2].upper()]


def plan(options: PlanOptions) -> Result:
    """Run `jaxgpt plan`; exit code 1 when not even one sequence fits."""
    from jaxgpt.training.devices.mesh import make_mesh, parse_mesh, use_cpu_devices
    from jaxgpt.training.model.numerics import FLASH_CAPABILITY, choose_numerics
    from jaxgpt.training.step_memory import StepMemory, format_bytes

    memory, share = parse_memory(options.memory), allocator_share()
    usable = share * memory
    devices = _device_count(options.mesh)
    layout = ",".join(f"{axis}={size}" for axis, size in parse_mesh(options.mesh, devices).items())
    use_cpu_devices(devices)
    mesh = make_mesh(options.mesh, devices)
    model, train = model_config(options.model), _planned_training(options, devices)
    step = StepMemory(model, train, mesh)
    say(
        f"each of {devices} device(s) as {dict(mesh.shape)}: parameters {format_bytes(step.params_bytes)}, "
        f"gradients {format_bytes(step.params_bytes)}, optimizer {format_bytes(step.optimizer_bytes)}"
    )
    if choose_numerics(model, train, "gpu", FLASH_CAPABILITY)[0].flash:
        say("counted without flash attention, with which an A100 or newer needs much less for activations")
    say(f"JAX takes {share:.0%} of {format_bytes(memory)} (XLA_CLIENT_MEM_FRACTION names another share)")
    largest = step.largest(usable)
    accumulate = train.batch_size // devices // largest if largest else None
    figures: dict[str, Any] = {
        "preset": options.preset,
        "mesh": dict(mesh.shape),
        "memory_bytes": memory,
        "usable_bytes": usable,
        "params_bytes": step.params_bytes,
        "gradients_bytes": step.params_bytes,
        "optimizer_bytes": step.optimizer_bytes,
        "peak_bytes": {str(n): step.peaks[n] for n in sorted(step.peaks)},
        "largest_sequences_per_device": largest,
        "batch_size": train.batch_size,
        "accumulate": accumulate,
    }
    if largest:
        precision = f" --precision {train.precision}" if "precision" in options.given else ""
        say(
            f"fits into {format_bytes(usable)}, {format_bytes(step.peak(largest))} a device"
            f"{'' if precision else f' in {train.precision}'}: "
            f"--mesh {layout} --batch-size {train.batch_size} --grad-accum-steps {accumulate} "
            f"--block-size {model.block_size} --loss-chunks {train.loss_chunks}{precision}"
        )
        if not precision:
            say("train takes bf16 or fp16 on a GPU that has it, which needs less (--precision plans for it)")
    else:
        say(
            f"not even one sequence fits into {format_bytes(usable)} ({format_bytes(step.peak(1))} are "
            "needed); more devices on fsdp, --loss-chunks, --block-size or a lower --precision take less "
            "(and --remat, not counted)"
        )
    return Result(figures, passed=bool(largest))


def _device_count(mesh: str) -> int:
    devices = math.prod(map(int, re.findall(r"=(\d+)", mesh))) or 1
    if devices > MAX_CPU_DEVICES:
        raise UserError(f"mesh {mesh!r} has {devices} devices; at most {MAX_CPU_DEVICES} can be simulated")
    return devices


def _planned_training(options: PlanOptions, devices: int) -> TrainConfig:
    """Return the settings of the training; UserError where its batch does not divide over the devices."""
    train = train_config(options.training)
    check_optimizer(train.optimizer)
    if train.batch_size % devices:
        raise UserError(
            f"batch {train.batch_size} does not divide over {devices} devices; choose a multiple of them"
        )
    return train
