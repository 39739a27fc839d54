"""`jaxgpt plan`: how much memory a training takes on each device, before anything is allocated.

    jaxgpt plan gpt2 --mesh data=4 --memory 16GB --remat

Parameters and optimizer state follow from shapes and shardings. What a step needs besides comes from the
compiler: the step is compiled for simulated devices, with one and with two sequences a device, and the
line through both gives every other batch. A GPU's compiler orders and fuses differently, so leave it some
room: the figures of a CPU compilation are an estimate for a GPU.
"""

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from jaxgpt.config import ModelConfig, TrainConfig, find_preset
from jaxgpt.mesh import batch_sharding, make_mesh, parse_mesh, state_shardings, use_cpu_devices
from jaxgpt.model import graph_of, init_params
from jaxgpt.optimizer import make_optimizer
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.steps import choose_numerics, first_state, make_train_step

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
      remat: compute blocks again in the backward pass.
      loss_chunks: pieces in which logits are computed; the preset's if not given.
      check: also compile with so many sequences a device, and say how far off the plan is; 0 for not.
      json: print one JSON document with all figures on stdout.
    """

    preset: tyro.conf.Positional[str]
    mesh: str = "data=1"
    memory: str = "16GB"
    vocab_size: int = 50_257
    batch_size: int | None = None
    block_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    remat: bool = False
    loss_chunks: int | None = None
    check: int = 0
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
      params: parameters.
      gradients: of the parameters.
      optimizer: optimizer state, and the few other numbers of a training state.
      fixed: of a step whatever the batch, gradients included.
      per_sequence: more for each sequence of the micro-batch.
    """

    params: int
    gradients: int
    optimizer: int
    fixed: float
    per_sequence: float

    def total(self, sequences: int) -> float:
        """Peak with so many sequences a device and micro-batch."""
        return self.params + self.optimizer + self.fixed + sequences * self.per_sequence

    def largest(self, memory: float) -> int:
        """Most sequences a device and micro-batch that fit into so many bytes; 0 when none does."""
        room = memory - self.params - self.optimizer - self.fixed
        return max(int(room // self.per_sequence), 0)


def step_memory(model: ModelConfig, train: TrainConfig, mesh: Mesh, sequences: int) -> float:
    """Return the peak bytes a device of a compiled step, as the compiler counts them.

    Args:
      model: shape.
      train: settings; the batch is `sequences` on each device, `train.accumulate` times.
      mesh: over simulated or real devices; nothing is allocated.
      sequences: of a micro-batch, on each device.
    """
    A, rows = train.accumulate, sequences * mesh.size
    train = dataclasses.replace(train, batch_size=rows * A)
    numerics, _ = choose_numerics(model, train.precision, "cpu", 0.0)
    optimizer = make_optimizer(train)
    abstract = jax.eval_shape(lambda: first_state(init_params(model, 0), optimizer, 0, train))
    shardings = state_shardings(mesh, abstract)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    sharding = batch_sharding(mesh, axis=1, ndim=3)
    batch = jax.ShapeDtypeStruct((A, rows, model.block_size), jnp.int32, sharding=sharding)
    step = make_train_step(graph_of(model, numerics), optimizer, mesh, train, model.dropout > 0)
    jitted = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
    return peak_bytes(jitted.lower(state, batch, batch).compile())


def peak_bytes(compiled: Any) -> float:
    """Return arguments + temporaries + results that don't reuse an argument, in bytes a device."""
    found = compiled.memory_analysis()
    return float(
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def need(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> Need:
    """Return what a training takes on each device of a mesh."""
    optimizer = make_optimizer(train)
    abstract = jax.eval_shape(lambda: first_state(init_params(model, 0), optimizer, 0, train))
    shardings = state_shardings(mesh, abstract)
    params = _shard_bytes(abstract.params, shardings.params)
    state = _shard_bytes(abstract, shardings)
    one, two = (step_memory(model, train, mesh, sequences) for sequences in (1, 2))
    return Need(params, params, state - params, 2 * one - two - state, two - one)


def _shard_bytes(tree: Any, shardings: Any) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def parse_memory(text: str) -> float:
    """Return the bytes of "16GB", "15.8 GiB" or "16000MB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"memory {text!r} is no size; expected such as 16GB")
    return float(match[1]) * UNITS[match[2].upper()]


def plan(options: PlanOptions) -> Result:
    """Run `jaxgpt plan`; exit code 1 when not even one sequence fits."""
    preset = find_preset(options.preset)
    memory = parse_memory(options.memory)
    sizes = re.findall(r"=(\d+)", options.mesh)
    devices = math.prod(map(int, sizes)) or 1
    parse_mesh(options.mesh, devices)
    use_cpu_devices(devices)
    mesh = make_mesh(options.mesh, devices)
    model = preset.model(options.vocab_size)
    if options.block_size is not None:
        model = dataclasses.replace(model, block_size=options.block_size)
    changes: dict[str, Any] = {"precision": options.precision, "remat": options.remat}
    changes |= {} if options.loss_chunks is None else {"loss_chunks": options.loss_chunks}
    batch = options.batch_size or preset.train.batch_size
    # Two micro-batches: with one, the compiler would not keep a sum of gradients.
    train = dataclasses.replace(preset.train, batch_size=batch, accumulate=2 if batch % 2 == 0 else 1)
    train = dataclasses.replace(train, **changes)
    say(f"compiling {options.preset} for {dict(mesh.shape)}, twice; nothing is allocated")
    found = need(model, train, mesh)
    largest = found.largest(memory)
    micro = _largest_divisor(batch, largest * devices, devices)
    figures = {
        "preset": options.preset,
        "mesh": dict(mesh.shape),
        "memory_bytes": memory,
        "params_bytes": found.params,
        "gradients_bytes": found.gradients,
        "optimizer_bytes": found.optimizer,
        "fixed_bytes": found.fixed,
        "bytes_per_sequence": found.per_sequence,
        "largest_sequences_per_device": largest,
        "batch_size": batch,
        "accumulate": batch // micro if micro else None,
        "peak_bytes": found.total(micro // devices) if micro else found.total(1),
    }
    say(
        f"each device: parameters {_gb(found.params)}, gradients {_gb(found.gradients)}, "
        f"optimizer {_gb(found.optimizer)}, other fixed {_gb(max(found.fixed - found.gradients, 0))}, "
        f"and {_gb(found.per_sequence)} for each sequence of {model.block_size} tokens"
    )
    if options.check > 0:
        compiled = step_memory(model, train, mesh, options.check)
        off = found.total(options.check) / compiled - 1
        figures |= {"check_sequences": options.check, "check_bytes": compiled, "check_error": off}
        say(f"checked with {options.check} sequences a device: compiled {_gb(compiled)}, plan {off:+.2%}")
    if not largest:
        say(
            f"not even one sequence fits into {_gb(memory)} ({_gb(found.total(1))} are needed); "
            "more devices on fsdp, --remat, --loss-chunks or a lower precision take less"
        )
    elif not micro:
        say(f"batch {batch} does not divide over {devices} devices; at most {largest} sequences fit on each")
    else:
        say(
            f"fits into {_gb(memory)}: at most {largest} sequences a device; for a batch of {batch}: "
            f"--batch-size {batch} --accumulate {batch // micro}, {_gb(found.total(micro // devices))}"
        )
    return Result(figures, passed=bool(largest))


def _largest_divisor(batch: int, most: int, devices: int) -> int:
    """Return the largest micro-batch that divides the batch, over the devices; 0 when there is none."""
    fitting = [n for n in range(devices, min(batch, most) + 1, devices) if batch % n == 0]
    return max(fitting, default=0)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
