"""Keeping bad steps out: dynamic loss scaling, spikes, skipped steps."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.step.state import Guard

LARGEST_LOSS_SCALE = 2.0**24
GROWTH_STEPS = 1000  # finite steps after which the loss scale doubles
SPIKE_WARMUP = 100  # losses before the spike guard judges
SPIKE_MEMORY = 0.98  # of its running mean and variance


def spikes(loss: Array, guard: Guard, limit: float) -> Array:
    deviation = jnp.sqrt(guard.loss_variance) + 1e-6
    return (guard.losses >= SPIKE_WARMUP) & (loss > guard.loss_mean + limit * deviation)


def next_guard(guard: Guard, loss: Array, norm: Array, good: Array, config: TrainConfig) -> Guard:
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
