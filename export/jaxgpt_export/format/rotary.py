"""The table of rotary positions: one for the PyTorch module and the native engine alike.

Cosines and sines are computed in float64 and rounded once, so that every executor has the same bits.
"""

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.config import ROTARY_BASE, ModelConfig


def rope_table(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Return cosine and sine of every position and channel, (2, block_size, D).

    Channel i of a head, and channel i + D/2 with it, turns by position * 10000^(-2 i / D).

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864; pairs as in GPT-NeoX.
    """
    half = config.head_size // 2
    frequencies = ROTARY_BASE ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.arange(config.block_size, dtype=np.float64)[:, None] * np.tile(frequencies, 2)[None]
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
