"""Muon: momentum whose matrices are made orthogonal by Newton-Schulz iterations.

Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon (optax.contrib.muon).
"""

import jax.numpy as jnp
import optax

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.lr_schedule import Schedule


def matrices(config: TrainConfig, learning_rate: Schedule) -> optax.GradientTransformation:
    """Return the transformation of the blocks' matrices' gradients."""
    return optax.contrib.muon(
        learning_rate, beta=config.momentum, weight_decay=config.weight_decay, mu_dtype=jnp.float32
    )
