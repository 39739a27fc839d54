"""`jaxgpt-bench serving`: clients against our server and others, in interleaved rounds.

    jaxgpt-bench serving --preset gpt2
    jaxgpt-bench serving --artifact runs/tiny-int8 --url llama=http://127.0.0.1:8080

Our server is started by it; others (llama-server, vLLM, ...) are to run already, with the same weights, and
are named with --url. Prompts are random tokens. Nothing is drafted.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.serving.client import Streamed, load, stream
from jaxgpt_bench.serving.rows import LOAD, PROMPTS, LoadRow, PromptRow, ServingFigures

RUNNING = 4  # texts beside which long prompts arrive
OTHER_END = 8  # tokens that a repeated prompt ends with


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Measure clients against servers: tokens/s of all, time to first token, time between tokens.

    Attributes:
      artifact: that our server serves.
      preset: serve random weights of this preset's shape instead, int8-dynamic.
      url: other servers, each NAME=ADDRESS.
      clients: numbers of clients.
      temperature: of the texts; each is measured.
      tokens: of a text.
      prompt_tokens: of a text's prompt.
      long_prompt: tokens of a long prompt; 0 leaves long prompts out.
      requests: of each client in a round.
      rounds: each measures everything once.
      seed: of the prompts.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path | None = None
    preset: str | None = None
    url: tuple[str, ...] = ()
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    temperature: tuple[float, ...] = (0.0, 0.8)
    tokens: int = 128
    prompt_tokens: int = 16
    long_prompt: int = 512
    requests: int = 2
    rounds: int = 3
    seed: int = 0
    out: Path | None = None
    json: bool = False


def serving(options: ServingOptions) -> Result:
    """Run `jaxgpt-bench serving`."""
    for name in ("tokens", "prompt_tokens", "requests", "rounds", "long_prompt"):
        least = int(name != "long_prompt")
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {least}"
            )
    others = dict(_named_address(url) for url in options.url)
    if options.artifact and options.preset:
        raise UserError("--artifact and --preset are both given; leave one out")
    if not (options.artifact or options.preset or others):
        raise UserError("there is no server to measure; give --artifact, --preset or --url")
    prepare_output_file(options.out)
    from jaxgpt_bench.common.provenance import provenance

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:
        artifact = _artifact(options, Path(scratch))
        servers, alone = dict(others), None
        if artifact is not None:
            servers = {"jaxgpt": ends.enter_context(_our_server(artifact)), **others}
            alone = _Alone(artifact)
        measured = asyncio.run(_measure(options, servers, alone))
    settings = {
        name: getattr(options, name)
        for name in ("preset", "tokens", "prompt_tokens", "long_prompt", "requests", "rounds", "seed")
    }
    figures = ServingFigures(**measured, settings=settings, provenance=provenance())
    _show(figures)
    if options.out is not None:
        write_json(options.out, figures.to_json())
    return Result(figures.to_json())


def _named_address(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not equals or not address.startswith("http://"):
        raise UserError(f"--url {text}: expected NAME=http://HOST:PORT")
    return name, address


def _artifact(options: ServingOptions, scratch: Path) -> Path | None:
    if options.preset is None:
        return options.artifact
    from jaxgpt_bench.speed.random_models import random_artifacts

    random_artifacts(options.preset, scratch)
    return scratch / "int8-dynamic"


@contextlib.contextmanager
def _our_server(artifact: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "jaxgpt_export", "serve", "--artifact", str(artifact), "--port", "0"]
    command += ["--json", "--draft-tokens", "0", "--max-running", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"jaxgpt-export serve --artifact {artifact} did not start; its line says why")
        yield str(json.loads(line)["address"])
    finally:
        process.terminate()
        process.communicate()


class _Alone:
    """`generate` in this process, for the same prompts: what the server's one client is compared with."""

    def __init__(self, artifact: Path) -> None:
        from jaxgpt_export.format.artifact import read_artifact
        from jaxgpt_export.generation.open_session import choose_threads, open_session

        read = read_artifact(artifact)
        self.vocab_size = read.config.vocab_size
        self._session, _ = open_session(read, "native", choose_threads(0))

    def tokens_per_s(self, prompt: Sequence[int], count: int) -> float:
        from jaxgpt_bench.common.timing import timed_generation

        done = timed_generation(self._session, prompt, count)
        return count / (done["prefill_s"] + done["decode_s"])


async def _measure(
    options: ServingOptions, servers: Mapping[str, str], alone: _Alone | None
) -> dict[str, Any]:
    draw = random.Random(options.seed)
    vocab_size = 50_000 if alone is None else alone.vocab_size - 1  # not <|endoftext|>
    conditions = [(clients, t) for t in options.temperature for clients in options.clients]
    loads: dict[tuple[str, int, float], list[_Load]] = {}
    prompts: dict[str, list[tuple[float, ...]]] = {}
    alone_rates = []

    def prompt(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        if alone is not None:
            alone_rates.append(alone.tokens_per_s(prompt(options.prompt_tokens), options.tokens))
        for clients, temperature in conditions:
            asked = [prompt(options.prompt_tokens) for _ in range(clients * options.requests)]
            for name, address in servers.items():
                bodies = [_body(each, options.tokens, temperature, seed) for seed, each in enumerate(asked)]
                cpu = time.process_time()
                seconds, answers = await load(address, bodies, clients)
                found = _Load(seconds, answers, time.process_time() - cpu)
                loads.setdefault((name, clients, temperature), []).append(found)
        for name, address in servers.items() if options.long_prompt else ():
            prompts.setdefault(name, []).append(await _long_prompts(options, address, prompt))
    from jaxgpt_bench.common.rows import Spread

    rows = [_load_row(name, clients, t, found) for (name, clients, t), found in loads.items()]
    long = [_prompt_row(name, options.long_prompt, found) for name, found in prompts.items()]
    spread = Spread.of(alone_rates) if alone_rates else None
    return {"alone_tokens_per_s": spread, "load": tuple(rows), "prompts": tuple(long)}


def _body(prompt: Sequence[int], tokens: int, temperature: float, seed: int = 0) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": tokens, "temperature": temperature, "seed": seed}


@dataclasses.dataclass
class _Load:
    seconds: float
    answers: list[Streamed]
    cpu_seconds: float


def _load_row(name: str, clients: int, temperature: float, rounds: Sequence[_Load]) -> LoadRow:
    from jaxgpt_bench.common.rows import Spread

    firsts = [[1000 * answer.first_s for answer in found.answers] for found in rounds]
    gaps = [1000 * gap for found in rounds for answer in found.answers for gap in answer.gaps]
    rates = [sum(answer.tokens for answer in found.answers) / found.seconds for found in rounds]
    return LoadRow(
        server=name,
        clients=clients,
        temperature=temperature,
        tokens_per_s=Spread.of(rates),
        first_token_ms=Spread.of([float(np.median(each)) for each in firsts]),
        first_token_p99_ms=float(np.percentile(np.concatenate(firsts), 99)),
        between_tokens_ms=float(np.median(gaps)),
        between_tokens_p99_ms=float(np.percentile(gaps, 99)),
        client_cpu_share=sum(found.cpu_seconds for found in rounds) / sum(found.seconds for found in rounds),
    )


def _prompt_row(name: str, tokens: int, rounds: Sequence[tuple[float, ...]]) -> PromptRow:
    from jaxgpt_bench.common.rows import Spread

    first, again, quiet, busy = (Spread.of([1000 * s for s in each]) for each in zip(*rounds, strict=True))
    return PromptRow(
        server=name, prompt_tokens=tokens, first_ms=first, again_ms=again, quiet_ms=quiet, busy_p99_ms=busy
    )


async def _long_prompts(
    options: ServingOptions, address: str, prompt: Any
) -> tuple[float, float, float, float]:
    """Return what a round says of long prompts, in seconds; see PromptRow."""
    long = prompt(options.long_prompt)
    first = await stream(address, _body(long, 2, 0.0))
    again = await stream(address, _body([*long, *prompt(OTHER_END)], 2, 0.0))
    shorts = [_body(prompt(options.prompt_tokens), 4 * options.tokens, 0.0) for _ in range(RUNNING)]
    running = [asyncio.create_task(stream(address, body)) for body in shorts]
    busy_from = None
    arrivals = 0
    await asyncio.sleep(0.5)
    while not any(task.done() for task in running) and arrivals < 3:
        busy_from = busy_from or time.perf_counter()
        await stream(address, _body(prompt(options.long_prompt), 1, 0.0))
        arrivals += 1
    busy_to = time.perf_counter()
    answers = await asyncio.gather(*running)
    if busy_from is None:
        raise UserError("the texts ended before a long prompt came; give more --tokens")
    quiet, busy = [], []
    for answer in answers:
        times = [now for now, _ in answer.arrivals]
        for before, now in itertools.pairwise(times):
            if busy_from <= before and now <= busy_to:
                busy.append(now - before)
            elif now < busy_from:
                quiet.append(now - before)
    return first.first_s, again.first_s, float(np.median(quiet)), float(np.percentile(busy, 99))


def _show(figures: ServingFigures) -> None:
    from jaxgpt_bench.common.tables import table

    stderr.print(table(LOAD, figures.load).terminal())
    if figures.prompts:
        stderr.print(table(PROMPTS, figures.prompts).terminal())
    if figures.alone_tokens_per_s is not None:
        say(f"generate alone, greedy: {figures.alone_tokens_per_s.median:.0f} tokens/s, its prompt included")
