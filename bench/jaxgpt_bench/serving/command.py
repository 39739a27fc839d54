"""`jaxgpt-bench serving`: clients against our server and others, in interleaved rounds.

    jaxgpt-bench serving --preset gpt2
    jaxgpt-bench serving --preset gpt2 --llama-server ~/llama.cpp/build/bin/llama-server
    jaxgpt-bench serving --artifact runs/tiny-int8 --url other=http://127.0.0.1:8080

Our server is started by it, and llama.cpp's where its program is named; others are to run already, with the
same weights, and are named with --url. Prompts are random tokens. Nothing is drafted.
"""

import asyncio
import contextlib
import tempfile
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.serving.options import SERVED, ServingOptions

if TYPE_CHECKING:
    from jaxgpt_bench.noise.meter import NoiseMeter
    from jaxgpt_bench.serving.measure import Alone
    from jaxgpt_bench.serving.rows import ServingFigures

OURS, LLAMA = "jaxgpt", "llama-server"  # names of the servers that it starts


def serving(options: ServingOptions) -> Result:
    """Run `jaxgpt-bench serving`."""
    others = _checked(options)
    prepare_output_file(options.out)
    from jaxgpt_bench.noise.meter import NoiseMeter
    from jaxgpt_bench.noise.verdict import warn
    from jaxgpt_bench.serving.measure import Alone
    from jaxgpt_bench.serving.servers import cpu_seconds_beside, llama_server, our_server, require_program

    if options.llama_server is not None:
        require_program(options.llama_server)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:
        artifact = _artifact(options, Path(scratch))
        servers, alone = dict(others), None
        if artifact is not None:
            alone = Alone(artifact)
            options = options.fitted(alone.config.block_size)
            if options.llama_server is not None:
                parent = options.parent or Path(scratch) / "fp32"
                asked = options.llama_server, parent, Path(scratch)
                servers[LLAMA] = ends.enter_context(llama_server(*asked))
            servers = {OURS: ends.enter_context(our_server(artifact)), **servers}
        meter = NoiseMeter(own_cpu_s=cpu_seconds_beside(others.values()))
        figures = asyncio.run(_rounds(options, servers, alone, meter))
    _show(figures)
    warn(figures.noise)
    if options.out is not None:
        from jaxgpt_bench.serving.plot import write_serving_plots  # matplotlib takes a second

        say(f"wrote {options.out} and {', '.join(map(str, write_serving_plots(figures, options.out)))}")
    return Result(figures.to_json())


async def _rounds(
    options: ServingOptions, servers: Mapping[str, str], alone: "Alone | None", meter: "NoiseMeter"
) -> "ServingFigures":
    """Measure; --out has what all rounds so far say, so that the next one loses none of it."""
    from jaxgpt_export.generation.open_session import choose_threads

    from jaxgpt_bench.common.bandwidth import LARGE_BUFFER, read_bandwidth
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.serving.measure import measure
    from jaxgpt_bench.serving.rows import ServingFigures

    figures = None
    bandwidths: list[float] = []
    async for measured in measure(options, servers, alone):
        bandwidths.append(read_bandwidth(LARGE_BUFFER, choose_threads(0)))
        noise = meter.noise(bandwidths, accepted=options.accept_noise)
        figures = ServingFigures(**measured, **vars(provenance(noise)))
        if options.out is not None:
            for suffix in (".svg", ".png"):  # of an earlier measurement
                options.out.with_suffix(suffix).unlink(missing_ok=True)
            write_json(options.out, figures.to_json())
    assert figures is not None  # there is at least one round
    return figures


def _checked(options: ServingOptions) -> dict[str, str]:
    """Return the addresses of --url by their names; UserError for what can't be measured."""
    for name in ("tokens", "prompt_tokens", "requests", "rounds", "long_prompt", "shared_tokens"):
        least = int(name not in ("long_prompt", "shared_tokens"))
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {least}"
            )
    for name in ("clients", "temperature"):
        if not getattr(options, name):
            raise UserError(f"--{name} names none; give at least one")
    if min(options.clients) < 1:
        raise UserError(f"--clients has {min(options.clients)}, expected at least 1")
    if min(options.temperature) < 0:
        raise UserError(f"--temperature has {min(options.temperature)}, expected at least 0")
    others: dict[str, str] = {}
    for url in options.url:
        name, address = _named_address(url)
        if name in (OURS, LLAMA, *others):
            raise UserError(f"--url {url}: {name} names another server; choose another name")
        others[name] = address
    if options.artifact and options.preset:
        raise UserError("--artifact and --preset are both given; leave one out")
    if not (options.artifact or options.preset or others):
        raise UserError("there is no server to measure; give --artifact, --preset or --url")
    is_ours = options.artifact is not None or options.preset is not None
    if options.llama_server is not None and not (is_ours and (options.parent or options.preset)):
        raise UserError(
            "--llama-server is given the float weights of our server's model; give --artifact INT8 with "
            "--parent FP32, or --preset"
        )
    if options.parent is not None and options.llama_server is None:
        raise UserError("--parent is what --llama-server takes its weights from; give both or none")
    return others


def _named_address(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    try:
        url = urllib.parse.urlsplit(address)
        is_good = bool(name and equals and url.scheme == "http" and url.hostname and url.port != 0)
    except ValueError:  # of a port that is no number, or too large
        is_good = False
    if not is_good:
        raise UserError(f"--url {text}: expected NAME=http://HOST:PORT")
    return name, address


def _artifact(options: ServingOptions, scratch: Path) -> Path | None:
    if options.preset is None:
        return options.artifact
    from jaxgpt_bench.speed.random_models import random_artifacts

    random_artifacts(options.preset, scratch, [SERVED])
    return scratch / SERVED


def _show(figures: "ServingFigures") -> None:
    from jaxgpt_bench.common.tables import table
    from jaxgpt_bench.serving.rows import LOAD, PROMPTS

    stderr.print(table(LOAD, figures.load).terminal())
    if figures.prompts:
        stderr.print(table(PROMPTS, figures.prompts).terminal())
    if figures.alone_tokens_per_s is not None:
        say(f"generate alone, greedy: {figures.alone_tokens_per_s.median:.0f} tokens/s, its prompt included")
