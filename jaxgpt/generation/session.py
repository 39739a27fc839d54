"""What a model offers to those who choose its tokens: sessions that remember the tokens they were given."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@runtime_checkable
class Engine(Protocol):
    """A model that remembers the tokens it was given.

    Attributes:
      block_size: how many tokens it can hold.
    """

    block_size: int

    def start(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Forget everything, take a prompt, return the logits (V,) after its last token."""
        ...

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token, return the logits (V,) after it."""
        ...


@runtime_checkable
class RewindingEngine(Engine, Protocol):
    """An engine that takes several tokens at once, chooses greedily itself, and can forget the last ones."""

    def forward(self, tokens: Sequence[int], *, every: bool = False) -> npt.NDArray[np.float32]:
        """Take M tokens; return the logits after the last one (1, V), or after each (M, V)."""
        ...

    def greedy(self, tokens: Sequence[int], *, every: bool = False) -> npt.NDArray[np.int32]:
        """The same, but of the logits only the place of the largest, the first of equals."""
        ...

    def follow(self, token: int, most: int = 1, end: int = -1) -> list[int]:
        """Take a token and go on greedily; return up to `most` tokens, the last not taken yet, or `end`."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        ...
