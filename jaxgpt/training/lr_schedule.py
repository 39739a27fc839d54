"""The learning rate as a function of the step: it rises linearly, stays, and falls on a cosine or a line."""

from collections.abc import Callable
from typing import Any

import optax

from jaxgpt.shared.config import TrainConfig

Schedule = Callable[[Any], Any]


def schedule(config: TrainConfig, peak: float) -> Schedule:
    """Return the learning rate as a function of the step.

    Args:
      config: warmup_steps, max_steps, final_lr_fraction, lr_schedule, decay_fraction.
      peak: highest rate.
    """
    warmup = min(config.warmup_steps, config.max_steps - 1)
    rest = max(config.max_steps - warmup, 1)
    decay = max(round(config.decay_fraction * rest), 1)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.lr_schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, decay, alpha=config.final_lr_fraction)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_lr_fraction, decay)
    if decay == rest:
        return optax.join_schedules([rise, fall], [warmup])
    plateau = optax.constant_schedule(peak)
    return optax.join_schedules([rise, plateau, fall], [warmup, warmup + rest - decay])
