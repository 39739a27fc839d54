"""Gradients over micro-batches and devices, with what the devices say to each other written out."""

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
# What rounds a whole parameter, besides; of activations it is kept.
ROUNDED_AGAIN = {"abs", "custom_jvp_call", "div", "optimization_barrier", "stop_gradient"}


def make_gradients(
    graph: nnx.GraphDef[GPT], mesh: Mesh, config: TrainConfig, dropout: bool
) -> Callable[..., tuple[Array, Array, Params]]:
    """Return a function that sums loss, count and gradient over micro-batches and devices.

    It takes (params, factor, key, inputs, targets), the last two (A, B, T); gradients are those of
    factor * loss and lie as the parameters do. What the devices say to each other is written out here, not
    left to the partitioner: on the `fsdp` axis split parameters are gathered for each micro-batch, again for
    its backward pass, and their gradients summed and scattered; all else is summed up over the micro-batches
    first and reduced once. Activations never travel.
    """
    axes = tuple(axis for axis in AXES if mesh.shape[axis] > 1)

    def varying(tree: Any, over: tuple[str, ...]) -> Any:
        """Say that a value may differ along axes, or its gradient would be summed over them at once."""
        return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, over, to="varying"), tree) if over else tree

    def gathered(shards: Params, specs: dict[str, PartitionSpec]) -> Params:
        def whole(name: str, shard: Array) -> Array:
            if "fsdp" not in specs[name]:
                return shard
            axis = specs[name].index("fsdp")
            return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)

        return {name: whole(name, shard) for name, shard in shards.items()}

    def local(
        specs: dict[str, PartitionSpec],
        params: Params,
        factor: Array,
        key: Array,
        inputs: Int[Array, "A B T"],
        targets: Int[Array, "A B T"],
    ) -> tuple[Array, Array, Params]:
        """Do the work of one device, on its shards of the parameters and of the batch."""
        A, B, _ = inputs.shape
        place = jax.lax.axis_index(axes) if axes else 0
        split = {name: "fsdp" in spec for name, spec in specs.items()}
        missing = {name: tuple(a for a in axes if a != "fsdp" or not split[name]) for name in params}
        params = {name: varying(leaf, missing[name]) for name, leaf in params.items()}

        def scaled(params: Params, *batch: Any) -> tuple[Array, tuple[Array, Array]]:
            whole = gathered(params, specs)
            how: dict[str, Any] = {"chunks": config.loss_chunks, "remat": config.remat, "factor": factor}
            loss, count = summed_loss(graph, whole, *batch, **how)
            return loss * factor, (loss, count)

        if any(split.values()):
            wholes = jax.eval_shape(lambda shards: gathered(shards, specs), params)
            shapes = {leaf.shape for leaf in wholes.values()}
            scaled = jax.checkpoint(scaled, policy=partial(_kept_for_backward, shapes))

        def micro_step(carry: Any, batch: Any) -> tuple[Any, None]:
            micro_inputs, micro_targets, index = batch
            keys = None
            if dropout:  # a key a sequence of the global batch
                rows = (index * mesh.size + place) * B + jnp.arange(B)
                keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.wrap_key_data(key), row))(rows)
            (_, (loss, count)), grads = jax.value_and_grad(scaled, has_aux=True)(
                params, micro_inputs, micro_targets, keys
            )
            return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

        dtype = params["wte.embedding"].dtype
        none = varying((jnp.zeros((), dtype), jnp.zeros((), jnp.int32)), axes)
        carry = (*none, jax.tree.map(jnp.zeros_like, params))
        if A == 1:
            carry, _ = micro_step(carry, (inputs[0], targets[0], 0))
        else:
            carry, _ = jax.lax.scan(micro_step, carry, (inputs, targets, jnp.arange(A)))
        loss, count, grads = carry
        if not axes:
            return loss, count, grads
        # One reduction for all that has the same axes to cross.
        crossing: dict[tuple[str, ...], Params] = {}
        for name, grad in grads.items():
            crossing.setdefault(missing[name], {})[name] = grad
        whole_sums = crossing.pop(axes, {})
        loss, count, summed = jax.lax.psum((loss, count, whole_sums), axes)
        for over, part in crossing.items():
            summed |= jax.lax.psum(part, over) if over else part
        return loss, count, {name: summed[name] for name in grads}

    def gradients(params: Params, *rest: Array) -> tuple[Array, Array, Params]:
        specs = {name: sharding.spec for name, sharding in state_shardings(mesh, params).items()}
        if not axes:
            return local(specs, params, *rest)
        none, batch = PartitionSpec(), PartitionSpec(None, axes)
        call = jax.shard_map(
            partial(local, specs),
            mesh=mesh,
            in_specs=(specs, none, none, batch, batch),
            out_specs=(none, none, specs),
            axis_names=set(axes),
        )
        return call(params, *rest)

    return gradients


def _kept_for_backward(wholes: set[tuple[int, ...]], primitive: Any, *inputs: Any, **_: Any) -> bool:
    """Keep what was computed; gather and round parameters, and cast or lay out anything, again."""
    rounds = primitive.name in ROUNDED_AGAIN and any(array.shape in wholes for array in inputs)
    return primitive.name not in GATHERED_AGAIN and not rounds
