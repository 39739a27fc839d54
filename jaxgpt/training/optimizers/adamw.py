"""AdamW.

Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.lr_schedule import Schedule


def matrices(config: TrainConfig, learning_rate: Schedule) -> optax.GradientTransformation:
    """Return the transformation of the blocks' matrices' gradients."""
    return adamw(config, learning_rate, config.weight_decay)


def adamw(config: TrainConfig, learning_rate: Schedule, decay: float) -> optax.GradientTransformation:
    """Return AdamW as optax.adamw has it, with a weight decay of the project's."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2),
        add_decayed_weights(decay, config.cautious_weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def add_decayed_weights(decay: float, cautious: bool) -> optax.GradientTransformation:
    """Return the transformation that adds decay times the weight to an update.

    Args:
      decay: share of a weight.
      cautious: only to updates of the weight's sign, which shrink it too; where an update makes a weight
        larger, decay would work against it.

    Source of cautious decay: Chen et al. 2025, Cautious Weight Decay, arXiv:2510.12402.
    """
    if not cautious:
        return optax.add_decayed_weights(decay)

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, w: u + jnp.where(u * w > 0, decay * w, jnp.zeros_like(w)), updates, params
        )

    return optax.stateless(add)
