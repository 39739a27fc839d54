"""What a model offers to those who choose its tokens: sessions that remember the tokens they were given.

A session answers two calls: `prefill(tokens)` takes a prompt and `decode(token)` one more token; both return
the logits of the next one. What a session can do beyond that, a protocol each, is asked for where it helps.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@runtime_checkable
class Session(Protocol):
    """A model that remembers the tokens it was given.

    Attributes:
      block_size: how many tokens it can hold.
    """

    block_size: int

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Forget everything, take a prompt, return the logits (V,) after its last token."""
        ...

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token, return the logits (V,) after it."""
        ...


@runtime_checkable
class ScoringSession(Session, Protocol):
    """A session that takes several tokens at once, tells each one's logits, and can forget the last ones."""

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Take M tokens; return the logits after the last one (1, V), or after each (M, V)."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        ...


@runtime_checkable
class RewindableSession(ScoringSession, Protocol):
    """A scoring session that also chooses greedily itself."""

    def greedy(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.int32]:
        """Take M tokens; return the most probable next one, (1,) or after each (M,), the first of equals."""
        ...

    def decode_greedy(self, token: int, max_tokens: int = 1, stop_token: int = -1) -> list[int]:
        """Take a token and go on greedily.

        Returns:
          Up to `max_tokens` tokens, none behind a `stop_token`; the last of them is not taken yet.
        """
        ...


@runtime_checkable
class BatchSession(Protocol):
    """A session that holds several texts, each in a slot of its own, and takes tokens of all in one step.

    Attributes:
      block_size: how many tokens a slot can hold.
      slots: how many texts.
    """

    block_size: int
    slots: int

    def forward(self, tokens: Sequence[int], slots: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take tokens, each the next one of its slot, those of a slot side by side.

        Args:
          tokens: (M,).
          slots: (M,), the slot of each token.

        Returns:
          Logits (number of slots named, V) after the last token of each, in order.
        """
        ...

    def greedy(self, tokens: Sequence[int], slots: Sequence[int]) -> npt.NDArray[np.int32]:
        """Take tokens as `forward` does; return the most probable next one of each slot."""
        ...

    def truncate(self, length: int, slot: int) -> None:
        """Forget the tokens of a slot from `length` on."""
        ...
