"""The optimizer: AdamW, or Muon for the blocks' matrices with AdamW for the rest.

Weight decay acts on matrices only (kernels and embeddings, not gains and biases). The learning rate rises
linearly, then falls to `final_rate` of its peak along a cosine or a line.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxgpt.config import TrainConfig
from jaxgpt.model import Params

Schedule = Callable[[Any], Any]


def schedule(config: TrainConfig, peak: float) -> Schedule:
    """Return the learning rate as a function of the step.

    Args:
      config: warmup_steps, max_steps, final_rate, cooldown.
      peak: highest rate.
    """
    warmup = min(config.warmup_steps, config.max_steps - 1)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    rest = max(config.max_steps - warmup, 1)
    if config.cooldown == "cosine":
        fall = optax.cosine_decay_schedule(peak, rest, alpha=config.final_rate)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_rate, rest)
    joined: Schedule = optax.join_schedules([rise, fall], [warmup])
    return joined


def kind_of(name: str) -> str:
    """Classify a parameter by its name: "kernel" (a block's matrix), "embedding" or "vector"."""
    last = name.rpartition(".")[2]
    return last if last in ("kernel", "embedding") else "vector"


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the gradient transformation, clipping included.

    Source: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024, Muon (optax.contrib.muon).
    """
    matrix_rate = schedule(config, config.learning_rate)
    other_rate = schedule(config, config.embedding_rate)

    def adamw(rate: Schedule, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, config.beta1, config.beta2, weight_decay=decay)

    if config.optimizer == "muon":
        kernel = optax.contrib.muon(
            matrix_rate, beta=config.momentum, weight_decay=config.weight_decay, mu_dtype=jnp.float32
        )
    else:
        kernel = adamw(matrix_rate, config.weight_decay)
    transforms = {
        "kernel": kernel,
        "embedding": adamw(other_rate, config.weight_decay),
        "vector": adamw(other_rate, 0.0),
    }

    def labels(params: Params) -> dict[str, str]:
        return {name: kind_of(name) for name in params}

    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.multi_transform(transforms, labels))
