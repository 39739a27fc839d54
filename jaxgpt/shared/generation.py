"""The generation loop, one for every engine: JAX, the PyTorch module, whatever comes.

An engine answers two calls: `start(tokens)` takes a prompt and `step(token)` one more token; both return
the logits of the next one. The loop draws, streams text and stops.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.sampling import Sampler, Sampling
from jaxgpt.shared.tokenizer import TextStream, Tokenizer

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
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prefill_s: float
    decode_s: float


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


def generate_shown(engine: Engine, tokenizer: Tokenizer, options: PromptOptions) -> Generation:
    """Continue a prompt as a command does: the text streams to stdout, unless that is kept for JSON."""

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    sampling = options.sampling()
    done = generate(engine, tokenizer, options.prompt, options.max_new_tokens, sampling, options.stop, show)
    show("\n")
    return done


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
      engine: the model.
      tokenizer: the one that the model was trained with.
      prompt: text; an empty one starts a new document.
      max_new_tokens: at least 1.
      sampling: how tokens are drawn.
      stop: texts that end the generation and are not shown.
      on_text: called with each piece of text as soon as it is certain.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is below 1.
    """
    tokens = prompt_tokens(tokenizer, prompt, engine.block_size)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    sampler, stream = Sampler(sampling), TextStream(tokenizer, stop)
    show = on_text or (lambda text: None)
    room = engine.block_size - len(tokens) + 1  # the last token needs no place
    started = time.perf_counter()
    logits = engine.start(tokens)
    prefilled = time.perf_counter()
    new: list[int] = []
    reason: FinishReason = "context" if room < max_new_tokens else "length"
    for index in range(min(max_new_tokens, room)):
        token = sampler.draw(logits)
        new.append(token)
        if token == tokenizer.endoftext:
            reason = "endoftext"
            break
        show(stream.push(token))
        if stream.stopped:
            reason = "stop"
            break
        if index + 1 < min(max_new_tokens, room):
            logits = engine.step(token)
    show(stream.finish())
    if stream.stopped:
        reason = "stop"
    return Generation(stream.text, new, reason, prefilled - started, time.perf_counter() - prefilled)


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
