"""A text that is being generated: it takes tokens and knows when it is finished."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.repetition import changes_by_history, penalize_repetition
from jaxgpt.generation.sampling import Sampler, Sampling, require_number
from jaxgpt.generation.text_stream import TextStream
from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.tokenizer import Tokenizer

FinishReason = Literal["length", "stop", "endoftext", "context", "time"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
      text: what was generated, the prompt not included.
      tokens: its tokens, the stop included.
      finish_reason: "length" (max_new_tokens), "stop" (a stop string), "endoftext", "context" (the context
        is full), or "time" (the time that a server allows a text is over).
      prefill_s: seconds from the prompt to the first logits.
      decode_s: seconds for all that follows.
      guessed: draft tokens that were tried (see prompt_lookup.py); the name that reports have.
      accepted: how many of them the model would have chosen itself.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float
    guessed: int = 0
    accepted: int = 0


class GenerationState:
    """A text that is being generated: takes tokens, knows when it is finished.

    Args:
      tokenizer: the one that the model was trained with.
      prompt: text, an empty one starts a new document; or its tokens, at least one.
      block_size: tokens that the model's context holds.
      max_new_tokens: at least 1.
      sampling: how tokens are drawn.
      stop: texts that end the generation and are not shown.
      on_text: called with each piece of text as soon as it is certain.
      least_tokens: that max_new_tokens may be; 0 where a prompt alone may be taken, to score it.

    Attributes:
      prompt: its tokens.
      tokens: the generated ones.
      finish_reason: None until it is finished.
      endoftext: the token that ends it.
      changes_logits: whether `penalized` does anything.
      drafted: draft tokens that were tried; whoever drafts counts them.
      accepted: how many of them the model would have chosen itself.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is too small.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        block_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
        least_tokens: int = 1,
    ) -> None:
        if isinstance(prompt, str):
            self.prompt = prompt_tokens(tokenizer, prompt, block_size)
        else:
            self.prompt = list(prompt)
            require_room(self.prompt, block_size)
        require_number("max_new_tokens", max_new_tokens, whole=True)
        if max_new_tokens < least_tokens:
            raise UserError(f"max_new_tokens ({quoted(max_new_tokens)}) must be at least {least_tokens}")
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.sampler = Sampler(sampling)
        self.changes_logits = changes_by_history(sampling)
        self.drafted = self.accepted = 0
        room = block_size - len(self.prompt) + 1  # the last token needs no place
        self._max_tokens = min(max_new_tokens, room)
        self._reason_at_max: FinishReason = "context" if room < max_new_tokens else "length"
        self.endoftext = tokenizer.endoftext
        self._stream = TextStream(tokenizer, stop)
        self._show = on_text or (lambda text: None)
        self._started = self._first = time.perf_counter()

    def finished(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish_reason is not None

    @property
    def left(self) -> int:
        """How many more tokens it may take."""
        return self._max_tokens - len(self.tokens)

    def penalized(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the logits (V,) that the next token is drawn from, given the model's."""
        if not self.changes_logits:
            return logits
        return penalize_repetition(logits, self.prompt + self.tokens, self.sampler.sampling)

    def begin(self) -> None:
        """Count time from now on: a text that waited for its turn."""
        self._started = self._first = time.perf_counter()

    def end(self, reason: FinishReason) -> str:
        """Finish it before its time; return the text that was held back."""
        self.finish_reason = reason
        piece = self._stream.finish()
        self._show(piece)
        return piece

    def push(self, token: int) -> str:
        """Take the next token; return the text that it completes, often none."""
        if not self.tokens:
            self._first = time.perf_counter()
        self.tokens.append(token)
        piece = ""
        if token == self.endoftext:
            self.finish_reason = "endoftext"
        else:
            piece = self._stream.push(token)
            if not self._stream.stopped and not self.left:
                self.finish_reason = self._reason_at_max
        if self.finish_reason is not None:
            piece += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        self._show(piece)
        return piece

    def result(self) -> Generation:
        """Return what was generated."""
        assert self.finish_reason is not None
        times = (self._first - self._started, time.perf_counter() - self._first)
        text = self._stream.text
        return Generation(text, self.tokens, self.finish_reason, *times, self.drafted, self.accepted)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, block_size: int) -> list[int]:
    """Return the tokens of a prompt, or of a document's start for an empty one.

    Special tokens that are written out are read as such.

    Raises:
      UserError: the prompt is longer than the context.
    """
    tokens = tokenizer.encode(prompt, special=True) or [tokenizer.endoftext]
    require_room(tokens, block_size)
    return tokens


def require_room(tokens: Sequence[int], block_size: int) -> None:
    """Raise UserError unless a prompt fits the context."""
    if len(tokens) > block_size:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {block_size}; shorten the prompt"
        )
