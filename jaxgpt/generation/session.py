"""What a model offers to those who choose its tokens: sessions that remember the tokens they were given.

A session answers two calls: `prefill(tokens)` takes a prompt and `decode(token)` one more token; both return
the logits of the next one. What a session can do beyond that, a protocol each, is asked for where it helps.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.sampling import Sampling, Top


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
    """A scoring session that also chooses tokens itself."""

    def greedy(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.int32]:
        """Take M tokens; return the most probable next one, (1,) or after each (M,), the first of equals."""
        ...

    def decode_greedy(self, token: int, max_tokens: int = 1, stop_token: int = -1) -> list[int]:
        """Take a token and go on greedily.

        Returns:
          Up to `max_tokens` tokens, none behind a `stop_token`; the last of them is not taken yet.
        """
        ...

    def draw(
        self, logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        """Return `draw_token` of each row of logits (M, V); None for one that is not finite."""
        ...


@runtime_checkable
class BatchSession(Protocol):
    """A session that holds several texts, each in a slot of its own, and takes tokens of all in one step.

    Attributes:
      block_size: how many tokens a slot can hold.
      slots: how many texts.
      cache_bytes_per_token: bytes of keys and values that a token takes in all layers.
    """

    block_size: int
    slots: int

    @property
    def cache_bytes_per_token(self) -> int: ...

    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Take tokens, each the next one of its slot, those of a slot side by side.

        Args:
          tokens: (M,).
          slots: (M,), the slot of each token.
          all_logits: give the logits after every token.
          wanted: (M,), the tokens after which logits are given; None: as all_logits says.

        Returns:
          Logits (number of tokens wanted, V), in order: those after the last token of each slot, unless told
          otherwise. Nothing is computed for tokens that are not wanted.
        """
        ...

    def greedy(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Take tokens as `forward` does; return the most probable next one of each that is wanted.

        Raises:
          UserError: a logit of one of them is not finite; every slot holds what it held before.
        """
        ...

    def decode_greedy(
        self, token: int, max_tokens: int = 1, stop_token: int = -1, slot: int = 0
    ) -> list[int]:
        """Take a token into a slot and go on greedily, as in RewindableSession."""
        ...

    def draw(
        self, logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        """Return `draw_token` of each row of logits (M, V); None for one that is not finite."""
        ...

    def top(
        self, logits: npt.NDArray[np.float32], temperatures: Sequence[float], count: int
    ) -> list[Top | None]:
        """Return `top_of_row` of each row of logits (M, V); None for one that is not finite."""
        ...

    def truncate(self, length: int, slot: int) -> None:
        """Forget the tokens of a slot from `length` on."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold what the first `length` tokens of another one left there, and nothing else."""
        ...

    def release(self, slot: int) -> None:
        """Forget a slot and give its memory back."""
        ...

    def touch(self, slot: int, tokens: int) -> None:
        """Let the system back the memory of a slot's first positions now; what it holds stays."""
        ...


class SlotView:
    """One slot of a session, as a RewindableSession.

    Args:
      session: of which it is a slot.
      slot: which one.
    """

    def __init__(self, session: BatchSession, slot: int) -> None:
        self.block_size = session.block_size
        self._session, self._slot = session, slot

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Forget everything, take a prompt, return the logits (V,) after its last token."""
        self.truncate(0)
        return self.forward(tokens)[0]

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token, return the logits (V,) after it."""
        return self.forward([token])[0]

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Take M tokens; return the logits after the last one (1, V), or after each (M, V)."""
        return self._session.forward(tokens, [self._slot] * len(tokens), all_logits)

    def greedy(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.int32]:
        """Take M tokens; return the most probable next one, (1,) or after each (M,)."""
        return self._session.greedy(tokens, [self._slot] * len(tokens), all_logits)

    def decode_greedy(self, token: int, max_tokens: int = 1, stop_token: int = -1) -> list[int]:
        """Take a token and go on greedily."""
        return self._session.decode_greedy(token, max_tokens, stop_token, self._slot)

    def draw(
        self, logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        """Return `draw_token` of each row of logits (M, V); None for one that is not finite."""
        return self._session.draw(logits, samplings, uniforms)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._session.truncate(length, self._slot)
