"""One greedy generation, timed: the loop that every contestant runs."""

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxgpt.generation.drafting import TOKENS_PER_CALL
from jaxgpt.generation.session import RewindableSession, Session


@runtime_checkable
class TimesItself(Protocol):
    """A session whose own loop is timed, because its cache lives only in there."""

    def generate_greedily(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """Do what timed_generation does."""
        ...


def timed_generation(session: Session, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Generate greedily, never stopping early.

    A session that goes on greedily itself does so, as `generate` lets it; nothing is drafted.

    Args:
      session: the model.
      prompt: tokens.
      count: tokens to generate; prompt and they fit into the context.

    Returns:
      tokens, prefill_s (prompt to first token) and decode_s (the other count - 1 tokens).
    """
    if isinstance(session, TimesItself):
        return session.generate_greedily(prompt, count)
    started = time.perf_counter()
    if isinstance(session, RewindableSession):
        session.truncate(0)
        tokens = [int(session.greedy(list(prompt))[0])]
        first = time.perf_counter()
        while len(tokens) < count:
            tokens += session.decode_greedy(tokens[-1], min(TOKENS_PER_CALL, count - len(tokens)))
    else:
        tokens = [int(session.prefill(prompt).argmax())]
        first = time.perf_counter()
        while len(tokens) < count:
            tokens.append(int(session.decode(tokens[-1]).argmax()))
    return {"tokens": tokens, "prefill_s": first - started, "decode_s": time.perf_counter() - first}


def agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens before two texts part."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(first))
