"""A client that costs little: one streamed completion over a plain connection, its tokens timed.

Servers and clients share the cores here, so what a client takes a server lacks. Events are counted in what
arrives; only the last one is read as JSON.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.shared.errors import UserError

EVENT = re.compile(rb"^data: \{", re.MULTILINE)
SECONDS = 120


@dataclasses.dataclass
class Streamed:
    """A completion that has come.

    Attributes:
      started: time.perf_counter() before the request was sent.
      arrivals: when something came, and how many tokens.
      tokens: that the server says it generated.
    """

    started: float
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; those that came at once share the time."""
        found = []
        for (before, _), (now, count) in itertools.pairwise(self.arrivals):
            found += [(now - before) / count] * count
        return found


async def stream(
    address: str, body: dict[str, Any], heard: Callable[[int], None] = lambda count: None
) -> Streamed:
    """Ask for a streamed completion; UserError where there is no answer, or it is none.

    Args:
      address: of the server.
      body: of the request.
      heard: is told how many tokens came, as soon as they come.
    """
    try:
        return await _stream(address, body, heard)
    except TimeoutError:
        raise UserError(f"{address} took more than {SECONDS} s for an answer; give fewer --tokens") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"no server answers at {address} ({reason}); start it first") from None


async def _stream(address: str, body: dict[str, Any], heard: Callable[[int], None]) -> Streamed:
    url = urllib.parse.urlsplit(address)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
    found = Streamed(time.perf_counter())
    writer.write(head.encode() + content)
    received = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            while chunk := await reader.read(1 << 16):
                now = time.perf_counter()
                received += chunk
                text_events = (
                    len(EVENT.findall(chunk)) - chunk.count(b'"usage":{') - chunk.count(b'"usage": {')
                )
                if text_events > 0:
                    found.arrivals.append((now, text_events))
                    heard(text_events)
    finally:
        writer.close()
    if not received.startswith(b"HTTP/1.1 200") or not found.arrivals:
        raise UserError(f"{address} answers {bytes(received[:300])!r}, expected a stream of completions")
    usage = re.findall(rb'"completion_tokens":\s*(\d+)', received)
    found.tokens = int(usage[-1]) if usage else sum(count for _, count in found.arrivals)
    return found


async def load(address: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[Streamed]]:
    """Send requests from so many clients, each one after the other; return the seconds and the answers."""
    waiting = list(bodies)[::-1]
    answers: list[Streamed] = []

    async def client() -> None:
        while waiting:
            answers.append(await stream(address, waiting.pop()))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started, answers
