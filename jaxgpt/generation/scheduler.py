"""The one loop over a session's slots: texts that are generated side by side.

A step takes one token of every text that is being generated, and the whole prompt of one that begins; the
weights are read once for all of them. Each text is the one that it would be alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import BatchSession, Session
from jaxgpt.generation.state import Generation, GenerationState
from jaxgpt.shared.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what is asked for.

    Attributes:
      prompt: text to continue.
      max_new_tokens: tokens to generate at most.
      sampling: how they are drawn.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling


def generate_many(
    session: Session, tokenizer: Tokenizer, requests: Sequence[Request], stop: Sequence[str] = ()
) -> Iterator[tuple[int, Generation]]:
    """Generate texts, as many side by side as the session has slots; one after the other without slots.

    Yields:
      The place of a request and its text, in the order in which they end.

    Raises:
      UserError: a prompt leaves no room for a token.
    """
    if isinstance(session, BatchSession):
        yield from _generate_in_slots(session, tokenizer, requests, stop)
        return
    for index, request in enumerate(requests):
        arguments = (request.prompt, request.max_new_tokens, request.sampling, stop)
        yield index, generate(session, tokenizer, *arguments)


def _generate_in_slots(
    session: BatchSession, tokenizer: Tokenizer, requests: Sequence[Request], stop: Sequence[str]
) -> Iterator[tuple[int, Generation]]:
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, tuple[int, GenerationState]] = {}  # slot -> place of its request, and its text
    while waiting or running:
        for slot in range(session.slots):
            if slot not in running and waiting:
                index, request = waiting.pop()
                arguments = (request.prompt, session.block_size, request.max_new_tokens, request.sampling)
                running[slot] = (index, GenerationState(tokenizer, *arguments, stop))
                session.truncate(0, slot)
        tokens: list[int] = []
        slots: list[int] = []
        for slot, (_, state) in running.items():
            new = state.tokens[-1:] or state.prompt
            tokens += new
            slots += [slot] * len(new)
        states = [state for _, state in running.values()]
        drawn = _draw(session, states, tokens, slots)
        for (slot, (index, state)), token in zip(list(running.items()), drawn, strict=True):
            state.push(token)
            if state.finished():
                yield index, state.result()
                del running[slot]


def _draw(
    session: BatchSession, states: Sequence[GenerationState], tokens: list[int], slots: list[int]
) -> list[int]:
    """Take the tokens; return the next one of each text."""
    samplers = [state.sampler for state in states]
    if all(sampler.greedy for sampler in samplers):
        return [int(token) for token in session.greedy(tokens, slots)]
    rows = session.forward(tokens, slots)
    return [sampler.draw(logits) for sampler, logits in zip(samplers, rows, strict=True)]
