"""AdamW.

Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
"""

import optax

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.lr_schedule import Schedule


def matrices(config: TrainConfig, learning_rate: Schedule) -> optax.GradientTransformation:
    """Return the transformation of the blocks' matrices' gradients."""
    return optax.adamw(learning_rate, config.beta1, config.beta2, weight_decay=config.weight_decay)
