"""The slots of a session: those of running texts, and those that keep past texts for their beginnings.

A text that begins as another one did need not take those tokens again: their keys and values are copied
from the slot that has them, or the slot is taken over where nothing in it is lost. Logits do not depend on
how a prompt was split over steps, so a hit changes no bit.
"""

from collections.abc import Sequence

from jaxgpt.generation.session import BatchSession

LEAST_SHARED = 16  # tokens; copying fewer gains nothing
LOST_SHARE = 8  # a slot is taken over rather than copied where at most this part of what is shared is lost


class SlotPool:
    """Hands slots to texts, and keeps what they leave.

    Args:
      session: its slots are all the pool's.
      keep_bytes: keys and values of past texts that are kept; those used least recently go first. 0 keeps
        none and gives a slot's memory back at once; None keeps none and holds on to the memory.

    Attributes:
      tokens: what each slot holds; whoever lets a slot take tokens extends its list.
    """

    def __init__(self, session: BatchSession, keep_bytes: int | None = None) -> None:
        self._session = session
        self._keep_bytes = keep_bytes
        self.tokens: list[list[int]] = [[] for _ in range(session.slots)]
        self._used = [0] * session.slots  # tokens that a slot has held since its memory was given back
        self._empty = list(range(session.slots))[::-1]
        self._kept: list[int] = []  # the one used least recently first
        self._running: set[int] = set()

    @property
    def keeps(self) -> bool:
        """Whether past texts are of use."""
        return self._keep_bytes is not None

    @property
    def free(self) -> int:
        """How many slots no text runs in."""
        return len(self._empty) + len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Memory of the slots that keep past texts."""
        return sum(self._used[slot] for slot in self._kept) * self._session.cache_bytes_per_token

    def longest_shared(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Return the slot that begins as a prompt does for longest, and for how many tokens; (0, 0) if none.

        The last token of a prompt is never shared: the text's first logits come after it.
        """
        if not self.keeps:
            return 0, 0
        lengths = [(shared_length(prompt[:-1], tokens), slot) for slot, tokens in enumerate(self.tokens)]
        length, slot = max(lengths)
        return (slot, length) if length >= LEAST_SHARED else (0, 0)

    def take(self, prompt: Sequence[int], reuse: bool = True) -> tuple[int, int]:
        """Give a slot to a text; there must be a free one.

        Args:
          prompt: the text's.
          reuse: whether keys and values of another text may be used.

        Returns:
          The slot, and how many of the prompt's first tokens it holds.
        """
        source, length = self.longest_shared(prompt) if reuse else (0, 0)
        slot = self._place(source, length, len(prompt))
        if slot in self._kept:
            self._kept.remove(slot)
        if length and slot != source:
            self._session.copy(source, slot, length)
            if source in self._kept:  # used just now
                self._kept.remove(source)
                self._kept.append(source)
        else:
            self._session.truncate(length, slot)
        self.tokens[slot] = list(prompt[:length])
        self._running.add(slot)
        self._limit()
        return slot, length

    def _place(self, source: int, length: int, needed: int) -> int:
        """Choose the slot of a text of `needed` tokens that shares `length` of them with slot `source`."""
        lost = len(self.tokens[source]) - length
        if length and source in self._kept and (lost <= length // LOST_SHARE or self.free == 1):
            return source  # taken over
        others = [kept for kept in self._kept if kept != source or not length]
        grown = self.kept_bytes + needed * self._session.cache_bytes_per_token
        if self._empty and not (others and self._keep_bytes and grown > self._keep_bytes):
            return self._empty.pop()
        return others[0]  # its memory is there already

    def give_back(self, slot: int) -> None:
        """Take a slot back from a text that ended; what it holds is kept, as far as it may be."""
        self._running.remove(slot)
        self._used[slot] = max(self._used[slot], len(self.tokens[slot]))
        if self._keep_bytes is None:
            self.tokens[slot] = []
            self._empty.append(slot)
            return
        self._kept.append(slot)
        self._limit()

    def drop(self, slot: int) -> None:
        """Take a slot back whose content is not to be relied on."""
        self._running.remove(slot)
        self._forget(slot)

    def _limit(self) -> None:
        while self._keep_bytes is not None and self._kept and self.kept_bytes > self._keep_bytes:
            self._forget(self._kept.pop(0))

    def _forget(self, slot: int) -> None:
        self._session.release(slot)
        self.tokens[slot] = []
        self._used[slot] = 0
        self._empty.append(slot)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
