"""The pure functions that are compiled: a training step, an evaluation step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from jaxgpt.config import ModelConfig, Precision, TrainConfig
from jaxgpt.loss import summed_loss
from jaxgpt.mesh import AXES, state_shardings
from jaxgpt.model import GPT, Numerics, Params

FIRST_LOSS_SCALE = 2.0**15
LARGEST_LOSS_SCALE = 2.0**24
GROWTH_STEPS = 1000  # finite steps after which the loss scale doubles
SPIKE_WARMUP = 100  # losses before the spike guard judges
SPIKE_MEMORY = 0.98  # of its running mean and variance

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
COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
FLASH_CAPABILITY = 8.0  # cuDNN's fused attention needs an A100 or newer
MAX_FLASH_HEAD_SIZE = 128


def choose_numerics(
    model: ModelConfig, precision: Precision, platform: str, capability: float
) -> tuple[Numerics, str]:
    """Decide how a model is trained on a device.

    Args:
      model: shape.
      precision: of matrix products.
      platform: of the device: cpu, gpu.
      capability: CUDA compute capability; 0 where there is none.

    Returns:
      The numerics, and why attention is flash or not.
    """
    size = model.head_size
    obstacles = {
        f"the device is a {platform}, no GPU": platform != "gpu",
        f"compute capability {capability} is below {FLASH_CAPABILITY}": platform == "gpu"
        and capability < FLASH_CAPABILITY,
        "precision is fp32": precision == "fp32",
        f"head size {size} is no multiple of 8 up to {MAX_FLASH_HEAD_SIZE}": size % 8 > 0
        or size > MAX_FLASH_HEAD_SIZE,
        f"block_size {model.block_size} is odd": model.block_size % 2 > 0,
        "dropout acts on attention weights": model.dropout > 0,
    }
    found = [text for text, true in obstacles.items() if true]
    reason = f"attention by XLA ({found[0]})" if found else "flash attention by cuDNN"
    return Numerics(compute=COMPUTE_DTYPES[precision], flash=not found), reason


class Guard(NamedTuple):
    """What is remembered to keep bad steps out.

    Attributes:
      loss_scale: (), factor of the loss in the backward pass; 1 unless the precision is fp16.
      since_growth: (), finite steps since the scale last changed.
      skipped: (), steps that were not applied.
      skipped_in_row: (), the same since the last one that was.
      loss_mean: (), running mean of the loss.
      loss_variance: (), running variance of the loss.
      losses: (), how many entered them.
    """

    loss_scale: Array
    since_growth: Array
    skipped: Array
    skipped_in_row: Array
    loss_mean: Array
    loss_variance: Array
    losses: Array


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: parameters under GPT-2's names.
      opt_state: the optimizer's.
      step: (), steps done.
      rng: (2,), key data that dropout is derived from.
      guard: loss scale and skipped steps.
    """

    params: Params
    opt_state: Any
    step: Array
    rng: Array
    guard: Guard


def first_state(
    params: Params, optimizer: optax.GradientTransformation, seed: int, config: TrainConfig
) -> TrainState:
    """Return the state before the first step."""
    dtype = params["wte.embedding"].dtype
    scale = FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
    guard = Guard(jnp.full((), scale, dtype), zero, zero, zero, none, none, zero)
    return TrainState(params, optimizer.init(params), zero, jax.random.key_data(jax.random.key(seed)), guard)


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


def make_train_step(
    graph: nnx.GraphDef[GPT],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: TrainConfig,
    dropout: bool,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the step function.

    It takes a TrainState and inputs and targets of shape (A, B, T): A micro-batches whose gradients are
    summed, weighted by their number of targets, before one update. It returns the new state and
    the mean loss in nats per token, the gradient's norm before clipping, the loss scale and the counts of
    skipped steps. A step whose loss or gradient is not finite (or spikes, with `config.spike_guard`) counts
    as done but changes neither parameters nor optimizer.
    """
    gradients = make_gradients(graph, mesh, config, dropout)

    def train_step(
        state: TrainState, inputs: Int[Array, "A B T"], targets: Int[Array, "A B T"]
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        guard = state.guard
        factor = guard.loss_scale
        if config.precision == "fp16":  # of the mean: a sum over many tokens would pass float16's 65,504
            factor = factor / targets[0].size
        total, count, grads = gradients(state.params, factor, jax.random.key_data(key), inputs, targets)
        mean = 1.0 / jnp.maximum(count, 1).astype(total.dtype)
        loss = total * mean
        grads = jax.tree.map(lambda g: g * (mean / factor), grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if config.spike_guard:
            good &= ~_spikes(loss, guard, config.spike_guard)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        kept_params, kept_opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        guard = _next_guard(guard, loss, norm, good, config)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "loss_scale": guard.loss_scale,
            "skipped": guard.skipped,
            "skipped_in_row": guard.skipped_in_row,
        }
        return TrainState(kept_params, kept_opt_state, state.step + 1, state.rng, guard), metrics

    return train_step


def _spikes(loss: Array, guard: Guard, limit: float) -> Array:
    deviation = jnp.sqrt(guard.loss_variance) + 1e-6
    return (guard.losses >= SPIKE_WARMUP) & (loss > guard.loss_mean + limit * deviation)


def _next_guard(guard: Guard, loss: Array, norm: Array, good: Array, config: TrainConfig) -> Guard:
    scale, since = guard.loss_scale, guard.since_growth
    if config.precision == "fp16":
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        grows = finite & (since + 1 >= GROWTH_STEPS)
        grown = jnp.where(grows, jnp.minimum(scale * 2, LARGEST_LOSS_SCALE), scale)
        scale = jnp.where(finite, grown, jnp.maximum(scale / 2, 1.0))
        since = jnp.where(finite & ~grows, since + 1, 0)
    bad = (~good).astype(jnp.int32)
    memory = jnp.where(guard.losses > 0, SPIKE_MEMORY, 0.0).astype(loss.dtype)
    off = loss - guard.loss_mean
    mean = jnp.where(good, guard.loss_mean + (1 - memory) * off, guard.loss_mean)
    variance = jnp.where(guard.losses > 0, memory * (guard.loss_variance + (1 - memory) * off**2), 0.0)
    return Guard(
        scale,
        since,
        guard.skipped + bad,
        jnp.where(good, 0, guard.skipped_in_row + 1),
        mean,
        jnp.where(good, variance, guard.loss_variance).astype(loss.dtype),
        guard.losses + 1 - bad,
    )


def make_eval_step(graph: nnx.GraphDef[GPT], chunks: int = 1) -> Callable[..., tuple[Array, Array]]:
    """Return a function of (params, inputs, targets) that gives the summed loss and the number of targets."""

    def eval_step(
        params: Params, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
    ) -> tuple[Array, Array]:
        return summed_loss(graph, params, inputs, targets, chunks=chunks)

    return eval_step
