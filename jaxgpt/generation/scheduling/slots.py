"""The slots of a session: those of running texts, and those that keep past texts for their beginnings.

A text that begins as another one did need not take those tokens again: their keys and values are copied
from the slot that has them, or the slot is taken over where nothing in it is lost. Logits do not depend on
how a prompt was split over steps, so a hit changes no bit.
"""

from collections.abc import Sequence

from jaxgpt.generation.session import BatchSession

LEAST_SHARED = 16  # tokens; copying fewer gains nothing
TOUCHED = 64  # positions whose memory is made ready at a time
MOST_TOUCHED = 640  # of a slot: enough for most texts, and room for more of them
LOST_SHARE = 8  # a slot is taken over rather than copied where at most this part of what is shared is lost


class SlotPool:
    """Hands slots to texts, and keeps what they leave.

    Args:
      session: its slots are all the pool's.
      keep_bytes: memory of the slots in which no text runs, most of it keys and values of past texts; those
        used least recently go first. 0 keeps none and gives a slot's memory back at once; None keeps none
        and holds on to the memory.

    Attributes:
      tokens: what each slot holds; whoever lets a slot take tokens extends its list.
    """

    def __init__(self, session: BatchSession, keep_bytes: int | None = None) -> None:
        self._session = session
        self._keep_bytes = keep_bytes
        self.tokens: list[list[int]] = [[] for _ in range(session.slots)]
        self._backed = [0] * session.slots  # positions of a slot that have memory
        self._empty = list(range(session.slots))
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
        """Memory of the slots in which no text runs."""
        backed = sum(self._backed[slot] for slot in (*self._kept, *self._empty))
        return backed * self._session.cache_bytes_per_token

    def longest_shared(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Return the slot that begins as a prompt does for longest, and for how many tokens; (0, 0) if none.

        The last token of a prompt is never shared: the text's first logits come after it.
        """
        if not self.keeps:
            return 0, 0
        lengths = [(shared_length(prompt[:-1], tokens), slot) for slot, tokens in enumerate(self.tokens)]
        length, slot = max(lengths)
        return (slot, length) if length >= LEAST_SHARED else (0, 0)

    def take(self, prompt: Sequence[int], new_tokens: int = 0, reuse: bool = True) -> tuple[int, int]:
        """Give a slot to a text; there must be a free one.

        Args:
          prompt: the text's.
          new_tokens: that will follow it at most.
          reuse: whether keys and values of another text may be used.

        Returns:
          The slot, and how many of the prompt's first tokens it holds.
        """
        source, length = self.longest_shared(prompt) if reuse else (0, 0)
        slot = self._place(source, length, len(prompt) + new_tokens)
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
        """Choose the slot of a text of `needed` tokens that shares `length` of them with slot `source`.

        Memory that the system has to back first takes a step's time: where nothing else speaks for a slot,
        one that has it already is taken.
        """
        lost = len(self.tokens[source]) - length
        if length and source in self._kept and (lost <= length // LOST_SHARE or self.free == 1):
            return source  # taken over
        others = [kept for kept in self._kept if kept != source or not length]
        empty = max(self._empty, key=lambda slot: min(self._backed[slot], needed), default=None)
        if empty is not None and not (others and self._exceeds(needed - self._backed[empty])):
            self._empty.remove(empty)
            return empty
        return max(others, key=lambda slot: min(self._backed[slot], needed))  # of equals, the first

    def _exceeds(self, missing: int) -> bool:
        """Whether memory for so many more positions passes the limit, running texts' counted."""
        if missing <= 0 or not self._keep_bytes:
            return False
        backed = sum(max(a, len(tokens)) for a, tokens in zip(self._backed, self.tokens, strict=True))
        return (backed + missing) * self._session.cache_bytes_per_token > self._keep_bytes

    def touch_next(self) -> bool:
        """Let the system back some memory of an empty slot before a text needs it; False if all is done."""
        most = min(MOST_TOUCHED, self._session.block_size)
        slot = next((each for each in self._empty if self._backed[each] < most), None)
        grown = self.kept_bytes + TOUCHED * self._session.cache_bytes_per_token
        if slot is None or not self._keep_bytes or grown > self._keep_bytes:
            return False
        self._backed[slot] = min(self._backed[slot] + TOUCHED, most)
        self._session.touch(slot, self._backed[slot])
        return True

    def give_back(self, slot: int) -> None:
        """Take a slot back from a text that ended; what it holds is kept, as far as it may be."""
        self._running.remove(slot)
        self._backed[slot] = max(self._backed[slot], len(self.tokens[slot]))
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
        while self._keep_bytes is not None and self.kept_bytes > self._keep_bytes:
            backed = next((slot for slot in self._empty if self._backed[slot]), None)
            if backed is not None:  # of no use but its memory
                self._empty.remove(backed)
            self._forget(self._kept.pop(0) if backed is None else backed)

    def _forget(self, slot: int) -> None:
        self._session.release(slot)
        self.tokens[slot] = []
        self._backed[slot] = 0
        self._empty.append(slot)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
