"""Weights in blocks of a row that share a scale: what several peers take, each in a layout of its own."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def block_size_for(channels: int, largest: int = 128) -> int:
    """Return the largest power of two up to `largest`, at least 16, that divides a row; else 16."""
    size = largest
    while size > 16 and channels % size:
        size //= 2
    return size


def round_blocks(weight: Floats, block: int, bits: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Round a matrix to unsigned integers about 2^(bits - 1), in blocks of a row.

    8 bits: scale = largest / 127. 4 bits: the block's largest in size, of either sign, becomes -8.

    Args:
      weight: (O, I), I divisible by block.
      block: weights that share a scale.
      bits: 4 or 8.

    Returns:
      q: (O, I / block, block), 0 to 2^bits - 1.
      scale: (O, I / block); (q - 2^(bits - 1)) * scale is near the weight.
    """
    middle = 1 << (bits - 1)
    split = weight.reshape(len(weight), -1, block)
    at = np.abs(split).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(split, at, axis=-1)
    scale = np.abs(extreme) / (middle - 1) if bits == 8 else extreme / -middle
    scale = np.where(scale == 0, np.float32(1), scale)
    q = np.clip(np.rint(split / scale) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return q, scale[..., 0].astype(np.float32)


def pack_pairs(q: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put two 4-bit integers of the last axis into a byte, the even one into its lower half."""
    return q[..., ::2] | (q[..., 1::2] << np.uint8(4))
