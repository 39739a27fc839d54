"""The pure functions that are compiled: a training step, an evaluation step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.model.gpt import GPT
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.params import Params
from jaxgpt.training.step.gradients import make_gradients, make_loss
from jaxgpt.training.step.guard import next_guard, spikes
from jaxgpt.training.step.state import TrainState


def make_train_step(
    graph: nnx.GraphDef[GPT],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: TrainConfig,
    dropout: bool,
    flash: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the step function.

    It takes a TrainState and inputs and targets of shape (A, B, T): A micro-batches whose gradients are
    summed, weighted by their number of targets, before one update. It returns the new state and
    the mean loss in nats per token, the gradient's norm before clipping, the loss scale and the counts of
    skipped steps. A step whose loss or gradient is not finite (or spikes, with `config.spike_guard`) counts
    as done but changes neither parameters nor optimizer. `flash` says that attention is cuDNN's kernel.
    """
    gradients = make_gradients(graph, mesh, config, dropout, flash)

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
            good &= ~spikes(loss, guard, config.spike_guard)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        kept_params, kept_opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        guard = next_guard(guard, loss, norm, good, config)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "loss_scale": guard.loss_scale,
            "skipped": guard.skipped,
            "skipped_in_row": guard.skipped_in_row,
        }
        return TrainState(kept_params, kept_opt_state, state.step + 1, state.rng, guard), metrics

    return train_step


def make_eval_step(
    graph: nnx.GraphDef[GPT], chunks: int = 1, mesh: Mesh | None = None, flash: bool = False
) -> Callable[..., tuple[Array, Array]]:
    """Return a function of (params, inputs, targets) that gives the summed loss and the number of targets.

    Args:
      graph: structure of the model.
      chunks: see summed_loss.
      mesh: over which parameters and batch lie; None for a single device.
      flash: attention is cuDNN's kernel.
    """
    if mesh is not None and mesh.size > 1:
        return make_loss(graph, mesh, chunks, flash)

    def eval_step(
        params: Params, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
    ) -> tuple[Array, Array]:
        return summed_loss(graph, params, inputs, targets, chunks=chunks)

    return eval_step
