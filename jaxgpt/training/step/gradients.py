"""Gradients and losses over devices, with what these say to each other written out."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.devices.mesh import AXES, state_shardings
from jaxgpt.training.model.gpt import GPT
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.params import Params

# What stands between a shard and the first use of its parameter: as none of it is kept, no whole one is.
GATHERED_AGAIN = {
    "all_gather",
    "broadcast_in_dim",
    "convert_element_type",
    "pcast",
    "pvary",
    "reshape",
    "squeeze",
    "transpose",
}
# What rounds or cuts a whole parameter, besides; of activations it is kept.
ROUNDED_AGAIN = {"abs", "custom_jvp_call", "div", "optimization_barrier", "split", "stop_gradient"}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How parameters and batch lie on the mesh, for the function that runs on each device.

    Attributes:
      axes: of the mesh that have more than one device.
      devices: in all.
      specs: axes along which each parameter is split.
    """

    axes: tuple[str, ...]
    devices: int
    specs: dict[str, PartitionSpec]

    def is_split(self, name: str) -> bool:
        """Whether the devices of `fsdp` hold a part of the parameter each."""
        return "fsdp" in self.specs[name]

    def replicated_over(self, name: str) -> tuple[str, ...]:
        """Return the axes along which devices hold the same of a parameter: gradients are summed there."""
        return tuple(axis for axis in self.axes if axis != "fsdp" or not self.is_split(name))


def make_gradients(
    graph: nnx.GraphDef[GPT], mesh: Mesh, config: TrainConfig, dropout: bool, flash: bool = False
) -> Callable[..., tuple[Array, Array, Params]]:
    """Return a function that sums loss, count and gradient over micro-batches and devices.

    It takes (params, factor, key, inputs, targets), the last two (A, B, T); gradients are those of
    factor * loss and lie as the parameters do. What the devices say to each other is written out here, not
    left to the partitioner: on the `fsdp` axis split parameters are gathered for each micro-batch, again for
    its backward pass, and their gradients summed and scattered; all else is summed up over the micro-batches
    first and reduced once. Activations never travel.

    With cuDNN's attention (`flash`) axes of a single device are manual, too: were one left to the
    partitioner, JAX would lower the kernel for it to split, which fails beside the others. Elsewhere they
    stay as they are, for the compiler would then join other constants, and last bits change.
    """
    axes = tuple(axis for axis in AXES if mesh.shape[axis] > 1)

    def gradients(params: Params, *rest: Array) -> tuple[Array, Array, Params]:
        specs = {name: sharding.spec for name, sharding in state_shardings(mesh, params).items()}
        layout = _Layout(axes, mesh.size, specs)
        local = partial(_local_gradients, graph, config, layout, dropout)
        if not axes:
            return local(params, *rest)
        none, batch = PartitionSpec(), PartitionSpec(None, axes)
        call = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, none, none, batch, batch),
            out_specs=(none, none, specs),
            axis_names=set(AXES if flash else axes),
        )
        return call(params, *rest)

    return gradients


def make_loss(
    graph: nnx.GraphDef[GPT], mesh: Mesh, chunks: int, flash: bool = False
) -> Callable[..., tuple[Array, Array]]:
    """Return a function that sums loss and count of a batch (B, T) over several devices, without gradients.

    It takes (params, inputs, targets). Each device has its sequences, and gathers what it has not of the
    parameters; chunks and `flash` are as in a training step.
    """
    axes = tuple(axis for axis in AXES if mesh.shape[axis] > 1)

    def loss(params: Params, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]) -> tuple[Array, Array]:
        specs = {name: sharding.spec for name, sharding in state_shardings(mesh, params).items()}
        layout = _Layout(axes, mesh.size, specs)

        def local(params: Params, *batch: Array) -> tuple[Array, Array]:
            return jax.lax.psum(summed_loss(graph, _gathered(layout, params), *batch, chunks=chunks), axes)

        none, batch = PartitionSpec(), PartitionSpec(axes)
        call = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, batch, batch),
            out_specs=(none, none),
            axis_names=set(AXES if flash else axes),
        )
        return call(params, inputs, targets)

    return loss


def _local_gradients(
    graph: nnx.GraphDef[GPT],
    config: TrainConfig,
    layout: _Layout,
    dropout: bool,
    params: Params,
    factor: Array,
    key: Array,
    inputs: Int[Array, "A B T"],
    targets: Int[Array, "A B T"],
) -> tuple[Array, Array, Params]:
    """Do the work of one device, on its shards of the parameters and of the batch."""
    A, B, _ = inputs.shape
    device = jax.lax.axis_index(layout.axes) if layout.axes else 0
    params = {name: _varying(leaf, layout.replicated_over(name)) for name, leaf in params.items()}
    loss_and_gradient = jax.value_and_grad(_scaled_loss(graph, config, layout, params, factor), has_aux=True)

    def micro_step(carry: Any, batch: Any) -> tuple[Any, None]:
        micro_inputs, micro_targets, index = batch
        keys = None
        if dropout:  # a key a sequence of the global batch
            rows = (index * layout.devices + device) * B + jnp.arange(B)
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.wrap_key_data(key), row))(rows)
        (_, (loss, count)), grads = loss_and_gradient(params, micro_inputs, micro_targets, keys)
        return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

    dtype = params["wte.embedding"].dtype
    none = _varying((jnp.zeros((), dtype), jnp.zeros((), jnp.int32)), layout.axes)
    carry = (*none, jax.tree.map(jnp.zeros_like, params))
    if A == 1:
        carry, _ = micro_step(carry, (inputs[0], targets[0], 0))
    else:
        carry, _ = jax.lax.scan(micro_step, carry, (inputs, targets, jnp.arange(A)))
    return _reduced(layout, *carry)


def _scaled_loss(
    graph: nnx.GraphDef[GPT], config: TrainConfig, layout: _Layout, params: Params, factor: Array
) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    """Return the function that is differentiated: factor * loss, with the loss and the count beside it."""

    def scaled(params: Params, *batch: Any) -> tuple[Array, tuple[Array, Array]]:
        how: dict[str, Any] = {"chunks": config.loss_chunks, "remat": config.remat, "factor": factor}
        loss, count = summed_loss(graph, _gathered(layout, params), *batch, **how)
        return loss * factor, (loss, count)

    if not any(map(layout.is_split, params)):
        return scaled
    wholes = jax.eval_shape(lambda shards: _gathered(layout, shards), params)
    shapes = {leaf.shape for leaf in wholes.values()}
    return jax.checkpoint(scaled, policy=partial(_kept_for_backward, shapes))


def _gathered(layout: _Layout, shards: Params) -> Params:
    """Return whole parameters."""

    def whole(name: str, shard: Array) -> Array:
        if not layout.is_split(name):
            return shard
        return jax.lax.all_gather(shard, "fsdp", axis=layout.specs[name].index("fsdp"), tiled=True)

    return {name: whole(name, shard) for name, shard in shards.items()}


def _varying(tree: Any, over: tuple[str, ...]) -> Any:
    """Say that a value may differ along axes, or its gradient would be summed over them at once."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, over, to="varying"), tree) if over else tree


def _reduced(layout: _Layout, loss: Array, count: Array, grads: Params) -> tuple[Array, Array, Params]:
    """Sum over the devices: one reduction for all that has the same axes to cross."""
    axes = layout.axes
    if not axes:
        return loss, count, grads
    crossing: dict[tuple[str, ...], Params] = {}
    for name, grad in grads.items():
        crossing.setdefault(layout.replicated_over(name), {})[name] = grad
    whole_sums = crossing.pop(axes, {})
    loss, count, summed = jax.lax.psum((loss, count, whole_sums), axes)
    for over, part in crossing.items():
        summed |= jax.lax.psum(part, over) if over else part
    return loss, count, {name: summed[name] for name in grads}


def _kept_for_backward(wholes: set[tuple[int, ...]], primitive: Any, *inputs: Any, **_: Any) -> bool:
    """Keep what was computed; gather and round parameters, and cast or lay out anything, again."""
    rounds = primitive.name in ROUNDED_AGAIN and any(array.shape in wholes for array in inputs)
    return primitive.name not in GATHERED_AGAIN and not rounds
