"""The one loop over a session's slots: texts that are generated side by side.

A step takes one token of every text that is being generated, and the whole prompt of one that begins; the
weights are read once for all of them. Each text is the one that it would be alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxgpt_export.native.native_session import NativeSession

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.session import Engine
from jaxgpt.generation.state import Generation, Text
from jaxgpt.shared.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Order:
    """A prompt of a file and what it asks for."""

    prompt: str
    max_new_tokens: int
    sampling: Sampling


def generate_many(
    session: Engine, tokenizer: Tokenizer, orders: Sequence[Order], stop: Sequence[str] = ()
) -> Iterator[tuple[int, Generation]]:
    """Generate texts, as many side by side as the session has slots.

    Yields:
      The place of an order and its text, in the order in which they end.

    Raises:
      UserError: a prompt leaves no room for a token.
    """
    if not isinstance(session, NativeSession):
        for index, order in enumerate(orders):
            yield (
                index,
                generate(session, tokenizer, order.prompt, order.max_new_tokens, order.sampling, stop),
            )
        return
    waiting = list(enumerate(orders))[::-1]
    running: dict[int, tuple[int, Text]] = {}  # slot -> place and text
    while waiting or running:
        for slot in range(session.slots):
            if slot not in running and waiting:
                index, order = waiting.pop()
                arguments = (order.prompt, session.block_size, order.max_new_tokens, order.sampling, stop)
                running[slot] = (index, Text(tokenizer, *arguments))
                session.truncate(0, slot)
        tokens: list[int] = []
        slots: list[int] = []
        for slot, (_, text) in running.items():
            new = text.tokens[-1:] or text.prompt
            tokens += new
            slots += [slot] * len(new)
        for (slot, (index, text)), token in zip(
            list(running.items()), _draw(session, running, tokens, slots), strict=True
        ):
            text.push(token)
            if text.finished():
                yield index, text.done()
                del running[slot]


def _draw(
    session: NativeSession, running: dict[int, tuple[int, Text]], tokens: list[int], slots: list[int]
) -> list[int]:
    """Take the tokens; return the next one of each running text."""
    samplers = [text.sampler for _, text in running.values()]
    if all(sampler.greedy for sampler in samplers):
        return [int(token) for token in session.greedy(tokens, slots)]
    rows = session.forward(tokens, slots)
    return [sampler.draw(logits) for sampler, logits in zip(samplers, rows, strict=True)]
