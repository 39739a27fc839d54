"""Everything that a training step changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.model.params import Params

FIRST_LOSS_SCALE = 2.0**15


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
