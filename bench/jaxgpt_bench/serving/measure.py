"""The rounds of `jaxgpt-bench serving`."""

import asyncio
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.shared.console import say
from jaxgpt_bench.common.rows import Spread
from jaxgpt_bench.serving.client import Streamed, load, stream
from jaxgpt_bench.serving.options import OTHER_END, SLOTS, TIMES_LONGER, ServingOptions
from jaxgpt_bench.serving.rows import LoadRow, PromptRow

RUNNING = 4  # texts beside which long prompts arrive
QUIET_SHARE = 4  # one in so many of their tokens comes before the first long prompt
WARMUP_TOKENS = 4  # of texts that are not timed
LONG_PROMPTS = 3  # that arrive beside them at most
TOO_EARLY = (
    "the texts of {} tokens beside them ended too early; give more --tokens where the context holds them, or "
    "fewer --long-prompt"
)
# Options that the figures hold.
SETTINGS = ("preset", "tokens", "prompt_tokens", "shared_tokens", "long_prompt", "requests", "rounds", "seed")


class Alone:
    """`generate` in this process, for the same prompts: what the server's one client is compared with."""

    def __init__(self, artifact: Path) -> None:
        from jaxgpt_export.format.artifact import read_artifact
        from jaxgpt_export.generation.open_session import choose_threads, open_session

        read = read_artifact(artifact)
        self.config, self.kind = read.config, read.kind
        self._session, _ = open_session(read, "native", choose_threads(0))

    def tokens_per_s(self, prompt: Sequence[int], count: int) -> float:
        from jaxgpt_bench.common.timing import timed_generation

        done = timed_generation(self._session, prompt, count)
        return count / (done["prefill_s"] + done["decode_s"])


async def measure(
    options: ServingOptions, servers: Mapping[str, str], alone: Alone | None
) -> AsyncIterator[dict[str, Any]]:
    """Run the rounds.

    Args:
      options: of the command, fitted to the context where that is known.
      servers: addresses by name.
      alone: the model of our server; None where it is not among them, and its context is not known.

    Yields:
      After each round, what all rounds so far say: the figures but for what `provenance` says.
    """
    longest = TIMES_LONGER * options.tokens
    if alone is not None:
        longest = min(longest, alone.config.block_size - options.prompt_tokens)
    draw = random.Random(options.seed)
    vocab_size = 50_000 if alone is None else alone.config.vocab_size - 1  # not <|endoftext|>
    conditions = [(clients, t, 0) for t in options.temperature for clients in options.clients]
    if options.shared_tokens:
        conditions += [
            (clients, options.temperature[0], options.shared_tokens) for clients in options.clients
        ]
    loads: dict[tuple[str, int, float, int], list[_Load]] = {}
    prompts: dict[str, list[tuple[float, ...]] | None] = {}  # None: no room for them beside the texts
    alone_rates = []

    def prompt(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        if alone is not None:
            alone_rates.append(alone.tokens_per_s(prompt(options.prompt_tokens), options.tokens))
        for index, (clients, temperature, shared) in enumerate(conditions):
            beginning = prompt(shared)
            asked = [[*beginning, *prompt(options.prompt_tokens)] for _ in range(clients * options.requests)]
            for name in _in_turn(servers, number + index):
                found = await _loaded(servers[name], asked, options.tokens, temperature, clients)
                loads.setdefault((name, clients, temperature, shared), []).append(found)
        for name, address in servers.items() if options.long_prompt else ():
            earlier = prompts.setdefault(name, [])
            if earlier is None:
                continue
            if (times := await _long_prompts(options, address, prompt, longest)) is not None:
                earlier.append(times)
            else:
                prompts[name] = None
                say(f"{name}: long prompts are left out: {TOO_EARLY.format(longest)}")
        rows = [
            _load_row(name, *condition, loads[name, *condition])
            for condition in dict.fromkeys(conditions)
            for name in servers
        ]
        long = [_prompt_row(name, options.long_prompt, each) for name, each in prompts.items() if each]
        spread = Spread.of(alone_rates) if alone_rates else None
        settings = {name: getattr(options, name) for name in SETTINGS} | {"rounds": number + 1}
        settings |= {} if alone is None else {"kind": alone.kind, "slots": SLOTS}
        figures = {"alone_tokens_per_s": spread, "load": tuple(rows), "prompts": tuple(long)}
        yield {**figures, "settings": settings}


def _in_turn(names: Iterable[str], first: int) -> list[str]:
    """Return names in their order, begun with another one each time."""
    every = list(names)
    return [every[(first + index) % len(every)] for index in range(len(every))]


def _body(prompt: Sequence[int], tokens: int, temperature: float, seed: int = 0) -> dict[str, Any]:
    every = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # servers have other defaults: all draw from all tokens
    asked = {"prompt": list(prompt), "max_tokens": tokens, "temperature": temperature, "seed": seed}
    return {**asked, **every} if temperature > 0 else asked


@dataclasses.dataclass
class _Load:
    seconds: float
    answers: list[Streamed]
    cpu_seconds: float


async def _loaded(
    address: str, asked: Sequence[list[int]], tokens: int, temperature: float, clients: int
) -> _Load:
    """Time requests, after a short one of each client: what a change of their number costs is not timed.

    The short one's prompt begins otherwise, so that no beginning is known afterwards.
    """
    short = _body(asked[0][::-1], min(WARMUP_TOKENS, tokens), temperature)
    await load(address, [short] * clients, clients)
    bodies = [_body(each, tokens, temperature, seed) for seed, each in enumerate(asked)]
    cpu = time.process_time()
    seconds, answers = await load(address, bodies, clients)
    return _Load(seconds, answers, time.process_time() - cpu)


def _load_row(name: str, clients: int, temperature: float, shared: int, rounds: Sequence[_Load]) -> LoadRow:
    firsts = [[1000 * answer.first_s for answer in found.answers] for found in rounds]
    gaps = [1000 * gap for found in rounds for answer in found.answers for gap in answer.gaps] or [0.0]
    rates = [sum(answer.tokens for answer in found.answers) / found.seconds for found in rounds]
    return LoadRow(
        server=name,
        clients=clients,
        temperature=temperature,
        shared_tokens=shared,
        tokens_per_s=Spread.of(rates),
        first_token_ms=Spread.of([float(np.median(each)) for each in firsts]),
        first_token_p99_ms=float(np.percentile(np.concatenate(firsts), 99)),
        between_tokens_ms=float(np.median(gaps)),
        between_tokens_p99_ms=float(np.percentile(gaps, 99)),
        client_cpu_share=sum(found.cpu_seconds for found in rounds) / sum(found.seconds for found in rounds),
    )


def _prompt_row(name: str, tokens: int, rounds: Sequence[tuple[float, ...]]) -> PromptRow:
    first, again, quiet, busy = (Spread.of([1000 * s for s in each]) for each in zip(*rounds, strict=True))
    return PromptRow(
        server=name, prompt_tokens=tokens, first_ms=first, again_ms=again, quiet_ms=quiet, busy_p99_ms=busy
    )


async def _long_prompts(
    options: ServingOptions, address: str, prompt: Callable[[int], list[int]], longest: int
) -> tuple[float, float, float, float] | None:
    """Return what a round says of long prompts, in seconds (see PromptRow); None where texts ended too early.

    Args:
      options: whose long prompts arrive.
      address: of the server.
      prompt: draws one of so many tokens.
      longest: tokens of the texts beside which they arrive.
    """
    long = prompt(options.long_prompt)
    first = await stream(address, _body(long, 2, 0.0))
    again = await stream(address, _body([*long, *prompt(OTHER_END)], 2, 0.0))
    shorts = [_body(prompt(options.prompt_tokens), longest, 0.0) for _ in range(RUNNING)]
    awaited = [max(longest // QUIET_SHARE, 2)] * RUNNING  # tokens of each in the quiet
    is_over = asyncio.Event()

    def heard(place: int, count: int) -> None:
        awaited[place] -= count
        if max(awaited) <= 0:
            is_over.set()

    running = [
        asyncio.create_task(stream(address, body, functools.partial(heard, place)))
        for place, body in enumerate(shorts)
    ]
    quiet_ends = asyncio.create_task(is_over.wait())
    await asyncio.wait([quiet_ends, *running], return_when=asyncio.FIRST_COMPLETED)
    quiet_ends.cancel()
    busy_from = None
    arrivals = 0
    while not any(task.done() for task in running) and arrivals < LONG_PROMPTS:
        busy_from = busy_from or time.perf_counter()
        await stream(address, _body(prompt(options.long_prompt), 1, 0.0))
        arrivals += 1
    busy_to = time.perf_counter()
    answers = await asyncio.gather(*running)
    if busy_from is None:
        return None
    quiet, busy = [], []
    for answer in answers:
        times = [now for now, _ in answer.arrivals]
        for before, now in itertools.pairwise(times):
            if now < busy_from:
                quiet.append(now - before)
            elif before <= busy_to:  # also a wait that began before a prompt came, or ended after the last
                busy.append(now - before)
    if not quiet or not busy:
        return None
    return first.first_s, again.first_s, float(np.median(quiet)), float(np.percentile(busy, 99))
