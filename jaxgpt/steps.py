"""The pure functions that are compiled: the loss, a training step, an evaluation step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.model import GPT, Params, merge


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: parameters under GPT-2's names.
      opt_state: the optimizer's.
      step: (), steps done.
      rng: (2,), key data that dropout is derived from.
    """

    params: Params
    opt_state: Any
    step: Array
    rng: Array


def summed_loss(
    graph: nnx.GraphDef[GPT],
    params: Params,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    key: jax.Array | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Cross entropy over the positions whose target is not negative.

    Args:
      graph: structure of the model.
      params: its parameters.
      inputs: tokens.
      targets: the tokens that follow; negative ones do not count.
      key: for dropout.

    Returns:
      The sum in nats, and the number of positions.
    """
    logits = merge(graph, params)(inputs, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    counted = targets >= 0
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted, dtype=jnp.int32)


def make_train_step(
    graph: nnx.GraphDef[GPT], optimizer: optax.GradientTransformation, dropout: bool
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the step function.

    It takes a TrainState and inputs and targets of shape (A, B, T): A micro-batches whose gradients are
    summed, weighted by their number of targets, before one update. It returns the new state and
    the mean loss in nats per token and the gradient's norm before clipping.
    """

    def train_step(
        state: TrainState, inputs: Int[Array, "A B T"], targets: Int[Array, "A B T"]
    ) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grad_fn = jax.value_and_grad(lambda params, *batch: summed_loss(graph, params, *batch), has_aux=True)

        def micro_step(carry: Any, batch: Any) -> tuple[Any, None]:
            micro_inputs, micro_targets, index = batch
            key = jax.random.fold_in(step_key, index) if dropout else None
            (loss, count), grads = grad_fn(state.params, micro_inputs, micro_targets, key)
            return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

        A = inputs.shape[0]
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        dtype = state.params["wte.embedding"].dtype
        carry = (jnp.zeros((), dtype), jnp.zeros((), jnp.int32), zeros)
        if A == 1:
            carry, _ = micro_step(carry, (inputs[0], targets[0], 0))
        else:
            carry, _ = jax.lax.scan(micro_step, carry, (inputs, targets, jnp.arange(A)))
        loss, count, grads = carry
        scale = 1.0 / jnp.maximum(count, 1).astype(dtype)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss * scale, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.step + 1, state.rng), metrics

    return train_step


def make_eval_step(graph: nnx.GraphDef[GPT]) -> Callable[..., tuple[Array, Array]]:
    """Return a function of (params, inputs, targets) that gives the summed loss and the number of targets."""

    def eval_step(
        params: Params, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
    ) -> tuple[Array, Array]:
        return summed_loss(graph, params, inputs, targets)

    return eval_step
