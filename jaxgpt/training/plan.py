"""`jaxgpt plan`: how much memory a training takes on each device, before anything is allocated.

    jaxgpt plan gpt2 --mesh data=4 --memory 16GB

Parameters and optimizer state follow from shapes and shardings. What a step needs at its peak is the
compiler's own count: the step is compiled for simulated CPU devices, for the micro-batches that divide the
batch, until the largest that fits is found. A GPU's compiler fuses and orders differently, so leave it some
room. Rematerialization has no option here: the CPU's compiler undoes it.
"""

import bisect
import dataclasses
import math
import re
from typing import Any, Literal

import jax
import tyro

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.devices.mesh import make_mesh, parse_mesh, use_cpu_devices
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TB": 1e12, "TIB": 2**40}
MAX_DEVICES = 1024  # simulated at once


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Say what a training takes on each device, and the largest micro-batch that fits.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      mesh: layout of the devices, such as data=4,fsdp=2; its product is their number.
      memory: of one device, such as 16GB.
      vocab_size: number of tokens.
      batch_size: sequences an optimizer step; the preset's if not given.
      block_size: longest context; the preset's if not given.
      precision: of matrix products.
      loss_chunks: pieces in which logits are computed; the preset's if not given.
      json: print one JSON document with all figures on stdout.
    """

    preset: tyro.conf.Positional[str]
    mesh: str = "data=1"
    memory: str = "16GB"
    vocab_size: int = 50_257
    batch_size: int | None = None
    block_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_chunks: int | None = None
    json: bool = False


def _shard_bytes(tree: Any, shardings: Any) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def parse_memory(text: str) -> float:
    """Return the bytes of "16GB", "15.8 GiB" or "16000MB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"memory {text!r} is no size; expected such as 16GB")
    return float(match[1]) * UNITS[match[2].upper()]


def plan(options: PlanOptions) -> Result:
    """Run `jaxgpt plan`; exit code 1 when not even one sequence fits."""
    preset = find_preset(options.preset)
    memory = parse_memory(options.memory)
    sizes = re.findall(r"=(\d+)", options.mesh)
    devices = math.prod(map(int, sizes)) or 1
    if devices > MAX_DEVICES:
        raise UserError(
            f"mesh {options.mesh!r} has {devices} devices; at most {MAX_DEVICES} can be simulated"
        )
    layout = ",".join(f"{axis}={size}" for axis, size in parse_mesh(options.mesh, devices).items())
    use_cpu_devices(devices)
    mesh = make_mesh(options.mesh, devices)
    model = preset.model(options.vocab_size)
    if options.block_size is not None:
        model = dataclasses.replace(model, block_size=options.block_size)
    batch = preset.train.batch_size if options.batch_size is None else options.batch_size
    if batch < 1:
        raise UserError(f"batch_size ({batch}) must be at least 1")
    if batch % devices:
        raise UserError(f"batch {batch} does not divide over {devices} devices; choose a multiple of them")
    chunks = preset.train.loss_chunks if options.loss_chunks is None else options.loss_chunks
    train = dataclasses.replace(preset.train, precision=options.precision, loss_chunks=chunks)
    numerics, _ = choose_numerics(model, train.precision, "cpu", 0.0)
    program = CompiledTraining(model, train, mesh, numerics)
    params = _shard_bytes(program.abstract.params, program.shardings.params)
    rest = _shard_bytes(program.abstract, program.shardings) - params
    say(
        f"each of {devices} device(s) as {dict(mesh.shape)}: parameters {_gb(params)}, "
        f"gradients {_gb(params)}, optimizer {_gb(rest)}"
    )
    measured: dict[int, float] = {}

    def peak(sequences: int) -> float:
        if sequences not in measured:
            grad_accum_steps = batch // (sequences * devices)
            # Two micro-batches take what any number takes; a single one keeps no sum of gradients.
            A = min(grad_accum_steps, 2)
            tried = dataclasses.replace(train, batch_size=A * sequences * devices, grad_accum_steps=A)
            measured[sequences] = peak_bytes(CompiledTraining(model, tried, mesh, numerics).compile_step())
            text = f"{sequences} sequence(s) of {model.block_size} tokens a device and micro-batch"
            say(f"  {text}: {_gb(measured[sequences])}, activations included")
        return measured[sequences]

    local = batch // devices
    divisors = [n for n in range(1, local + 1) if local % n == 0]
    fitting = bisect.bisect_right(divisors, memory, key=peak)
    largest = divisors[fitting - 1] if fitting else 0
    figures = {
        "preset": options.preset,
        "mesh": dict(mesh.shape),
        "memory_bytes": memory,
        "params_bytes": params,
        "gradients_bytes": params,
        "optimizer_bytes": rest,
        "peak_bytes": {str(n): measured[n] for n in sorted(measured)},
        "largest_sequences_per_device": largest,
        "batch_size": batch,
        "accumulate": local // largest if largest else None,
    }
    if largest:
        say(
            f"fits into {_gb(memory)}, {_gb(peak(largest))} a device: --mesh {layout} --batch-size {batch} "
            f"--grad-accum-steps {local // largest} --block-size {model.block_size} --loss-chunks {chunks} "
            f"--precision {options.precision}"
        )
    else:
        say(
            f"not even one sequence fits into {_gb(memory)} ({_gb(peak(1))} are needed); more devices on "
            "fsdp, --loss-chunks, --block-size or a lower --precision take less (and --remat, not counted)"
        )
    return Result(figures, passed=bool(largest))


def _gb(count: float | int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
