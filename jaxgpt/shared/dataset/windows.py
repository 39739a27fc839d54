"""A split cut into windows for a loss, and which of its tokens the loss counts."""

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.dataset.shards import Mask, ShardedMask, Tokens, bits
from jaxgpt.shared.errors import UserError


def counted(mask: Mask | ShardedMask, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Return whether the loss counts each of the tokens begin ... end - 1."""
    return mask.counted(begin, end) if isinstance(mask, ShardedMask) else bits(mask, begin, end)


def count_windows(tokens: Tokens, block_size: int) -> int:
    """Return into how many windows `windows` cuts a split, which is not read.

    Raises:
      UserError: the split has no full window.
    """
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the validation split has {len(tokens)} tokens, one window needs block_size + 1 = "
            f"{block_size + 1}; prepare more text, raise --val-fraction or lower --block-size"
        )
    return -(-(len(tokens) - 1) // block_size)


def windows(
    tokens: Tokens, block_size: int, mask: Mask | None = None, first: int = 0, end: int | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Cut a split into windows that predict each of its tokens but the first exactly once.

    Args:
      tokens: (N,), N > block_size.
      block_size: T, length of a window.
      mask: which tokens the loss counts; None for all.
      first: the window to begin with.
      end: where to end, before this window; None, and more than there are, for all.

    Returns:
      inputs: (W, T).
      targets: (W, T), the following tokens; -1, to be ignored, where the loss does not count them and after
        the end of the last window.

    Raises:
      UserError: the split has no full window.
    """
    count = count_windows(tokens, block_size)
    count = (count if end is None else min(end, count)) - first
    begin = first * block_size
    part = tokens[begin : begin + count * block_size + 1]
    padded = np.full(count * block_size + 1, -1, np.int32)
    padded[: len(part)] = part
    inputs = np.maximum(padded[:-1], 0).reshape(count, block_size)
    if mask is not None:
        padded[: len(part)][~counted(mask, begin, begin + len(part))] = -1
    targets = padded[1:].reshape(count, block_size)
    return inputs, targets


def check_tokens(largest: int, vocab_size: int, name: str) -> None:
    """Raise UserError for a token that a model does not have; frameworks fail otherwise each, or not at all.

    Args:
      largest: id among the tokens.
      vocab_size: of the model.
      name: of the model.
    """
    if largest >= vocab_size:
        raise UserError(
            f"the data holds token {largest}, {name} has tokens 0 to {vocab_size - 1}; give data that was "
            "prepared with the tokenizer of this model"
        )
