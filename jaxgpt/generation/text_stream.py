"""Tokens to text as they come: what may still change is held back until it is certain."""

import codecs
from collections.abc import Sequence

from jaxgpt.shared.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come, never showing half a character or a stop string.

    A character whose bytes are split over tokens is held back until it is whole; so is text that may
    turn out to begin a stop string.

    Attributes:
      text: everything shown so far.
      stopped: a stop string was met; it and what follows are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [s for s in stop if s]
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; return the text that it completes, often none."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token)), final=False)

    def finish(self) -> str:
        """Return what was held back at the end; bytes that never became a character are U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown = self._held[: min(found)]
        else:
            keep = 0 if final else max((_overlap(self._held, s) for s in self._stop), default=0)
            shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
