"""The generation loop, one for every engine: JAX, the PyTorch module, whatever comes.

An engine answers two calls: `start(tokens)` takes a prompt and `step(token)` one more token; both return
the logits of the next one. The loop draws, streams text and stops. An engine that can rewind is asked for
several tokens at a time where the text repeats itself.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.drafting import PromptLookup
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.sampling import Sampler, Sampling
from jaxgpt.shared.tokenizer import TextStream, Tokenizer

BURST = 8  # tokens that an engine makes without asking back: Python between them takes 45 us each

FinishReason = Literal["length", "stop", "endoftext", "context"]


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


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
      text: what was generated, the prompt not included.
      tokens: its tokens, the stop included.
      finish_reason: "length" (max_new_tokens), "stop" (a stop string), "endoftext", or "context" (the
        context is full).
      prefill_s: seconds from the prompt to the first logits.
      decode_s: seconds for all that follows.
      guessed: tokens that were tried ahead (see drafting.py).
      accepted: how many of them stood.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float
    guessed: int = 0
    accepted: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every command that continues a prompt takes.

    Attributes:
      prompt: text to continue; an empty one starts a new document.
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p.
      seed: of the random numbers.
      stop: texts that end the generation and are not shown.
      json: print one JSON document with text and figures on stdout instead of the text.
    """

    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json: bool = False

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; UserError for a value outside its range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def generate_shown(
    engine: Engine, tokenizer: Tokenizer, options: PromptOptions, guess: int = 0
) -> Generation:
    """Continue a prompt as a command does: the text streams to stdout, unless that is kept for JSON."""

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    sampling = options.sampling()
    done = generate(
        engine, tokenizer, options.prompt, options.max_new_tokens, sampling, options.stop, show, guess
    )
    show("\n")
    return done


class Text:
    """A text that is being generated: takes tokens, knows when it is finished.

    Args:
      tokenizer: the one that the model was trained with.
      prompt: text; an empty one starts a new document.
      block_size: tokens that the model's context holds.
      max_new_tokens: at least 1.
      sampling: how tokens are drawn.
      stop: texts that end the generation and are not shown.
      on_text: called with each piece of text as soon as it is certain.

    Attributes:
      prompt: its tokens.
      tokens: the generated ones.
      finish_reason: None until it is finished.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is below 1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        block_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
    ) -> None:
        self.prompt = prompt_tokens(tokenizer, prompt, block_size)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.sampler = Sampler(sampling)
        room = block_size - len(self.prompt) + 1  # the last token needs no place
        self._most = min(max_new_tokens, room)
        self._at_most: FinishReason = "context" if room < max_new_tokens else "length"
        self._endoftext = tokenizer.endoftext
        self._stream = TextStream(tokenizer, stop)
        self._show = on_text or (lambda text: None)
        self._started = self._first = time.perf_counter()

    def finished(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish_reason is not None

    @property
    def left(self) -> int:
        """How many more tokens it may take."""
        return self._most - len(self.tokens)

    def push(self, token: int) -> None:
        """Take the next token."""
        if not self.tokens:
            self._first = time.perf_counter()
        self.tokens.append(token)
        if token == self._endoftext:
            self.finish_reason = "endoftext"
        else:
            self._show(self._stream.push(token))
            if not self._stream.stopped and not self.left:
                self.finish_reason = self._at_most
        if self.finish_reason is not None:
            self._show(self._stream.finish())
        if self._stream.stopped:
            self.finish_reason = "stop"

    def done(self, guessed: int = 0, accepted: int = 0) -> Generation:
        """Return what was generated."""
        assert self.finish_reason is not None
        times = (self._first - self._started, time.perf_counter() - self._first)
        return Generation(self._stream.text, self.tokens, self.finish_reason, *times, guessed, accepted)


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    guess: int = 0,
) -> Generation:
    """Continue a prompt.

    Args:
      engine: the model.
      tokenizer: as the next ones, see Text.
      prompt: see Text.
      max_new_tokens: see Text.
      sampling: see Text.
      stop: see Text.
      on_text: see Text.
      guess: tokens to try ahead at most, where the engine can rewind; the text is the same.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is below 1.
    """
    text = Text(tokenizer, prompt, engine.block_size, max_new_tokens, sampling, stop, on_text)
    rewinding = engine if isinstance(engine, RewindingEngine) else None
    lookup = PromptLookup(text.prompt, guess if rewinding else 0)
    text.push(text.sampler.draw(engine.start(text.prompt)))
    while not text.finished():
        token = text.tokens[-1]
        if rewinding is None:
            text.push(text.sampler.draw(engine.step(token)))
            continue
        lookup.push(token)
        guessed = lookup.guess(text.left - 1)
        started = time.perf_counter()
        if text.sampler.greedy and not guessed:
            most = min(text.left, BURST, lookup.patience if guess else BURST)
            drawn = rewinding.follow(token, most, tokenizer.endoftext)
        else:
            drawn = _draw_after(rewinding, text.sampler, [token, *guessed])
        kept = min(len(drawn) - 1, len(guessed))
        if kept < len(guessed):
            rewinding.truncate(len(text.prompt) + len(text.tokens) + kept)
        lookup.learn(len(guessed), kept, time.perf_counter() - started, len(drawn))
        for place, next_token in enumerate(drawn):
            if place:
                lookup.push(drawn[place - 1])
            text.push(next_token)
            if text.finished():
                break
    return text.done(lookup.guessed, lookup.accepted)


def _draw_after(engine: RewindingEngine, sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    """Take a token and guesses of what follows; return the guesses that were right and the token after them.

    Each token is drawn from the logits that it would be drawn from without guesses, with a random number of
    its own.
    """
    every = len(tokens) > 1
    if sampler.greedy:
        choices: Sequence[int] = engine.greedy(tokens, every=every).tolist()
        right = (a == b for a, b in zip(choices, tokens[1:], strict=False))
        return list(choices[: 1 + sum(itertools.takewhile(bool, right))])
    drawn: list[int] = []
    for logits, guess in itertools.zip_longest(engine.forward(tokens, every=every), tokens[1:]):
        drawn.append(sampler.draw(logits))
        if drawn[-1] != guess:
            break
    return drawn


def prompt_tokens(tokenizer: Tokenizer, prompt: str, block_size: int) -> list[int]:
    """Return the tokens of a prompt, or of a document's start for an empty one.

    Raises:
      UserError: the prompt is longer than the context.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.endoftext]
    if len(tokens) > block_size:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {block_size}; shorten the prompt"
        )
    return tokens
