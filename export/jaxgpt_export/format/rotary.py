"""The table of rotary positions: one for the PyTorch module and the native engine alike.

Cosines and sines are computed in float64 and rounded once, so that every executor has the same bits.
"""

import math

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.config import ROTARY_BASE, ModelConfig
from jaxgpt.shared.errors import UserError

BLOCK = 1024  # positions whose angles exist at once


def rope_table(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Return cosine and sine of every position and channel, (2, block_size, D).

    Channel i of a head, and channel i + D/2 with it, turns by position * 10000^(-2 i / D).

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864; pairs as in GPT-NeoX.

    Raises:
      UserError: there is no memory for it: a context that no tensor vouches for.
    """
    half = config.head_size // 2
    frequencies = np.tile(ROTARY_BASE ** (-np.arange(half, dtype=np.float64) / half), 2)
    shape = (2, config.block_size, config.head_size)
    try:
        table = np.empty(shape, np.float32)
        for first in range(0, config.block_size, BLOCK):  # in float64 the whole would take four times as much
            positions = np.arange(first, min(first + BLOCK, config.block_size), dtype=np.float64)
            angles = positions[:, None] * frequencies
            table[:, first : first + BLOCK] = np.cos(angles), np.sin(angles)
    except MemoryError:
        raise UserError(
            f"the rotary positions of a context of {config.block_size} tokens take "
            f"{math.prod(shape) * 4 / 1e9:.1f} GB of memory, which is not there; is n_positions of its "
            "config.json right?"
        ) from None
    return table
