"""The learning rate of a step, to be written down beside its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.lr_schedule import schedule

BLOCK = 1024  # steps: one would wait for the devices each time


class LearningRates:
    """The rates of a training's blocks' matrices, computed so many at a time.

    Args:
      config: settings of the schedule.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._rate = jax.jit(jax.vmap(schedule(config, config.learning_rate)))
        self._block = -1
        self._rates: npt.NDArray[np.float32]

    def at(self, step: int) -> float:
        """Return the rate of a step, from 1 on, in as many digits as a float32 has."""
        block, place = divmod(step - 1, BLOCK)
        if block != self._block:
            steps = jnp.arange(block * BLOCK, (block + 1) * BLOCK, dtype=jnp.int32)
            self._block, self._rates = block, np.asarray(self._rate(steps), np.float32)
        return float(str(self._rates[place]))
