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
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_json
from jaxgpt_bench.serving.options import ServingOptions

if TYPE_CHECKING:
    from jaxgpt_bench.serving.rows import ServingFigures


# Options that the figures hold.
SETTINGS = ("preset", "tokens", "prompt_tokens", "shared_tokens", "long_prompt", "requests", "rounds", "seed")


def serving(options: ServingOptions) -> Result:
    """Run `jaxgpt-bench serving`."""
    for name in ("tokens", "prompt_tokens", "requests", "rounds", "long_prompt", "shared_tokens"):
        least = int(name not in ("long_prompt", "shared_tokens"))
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {least}"
            )
    for name in ("clients", "temperature"):
        if not getattr(options, name):
            raise UserError(f"--{name} names none; give at least one")
    others = dict(_named_address(url) for url in options.url)
    if options.artifact and options.preset:
        raise UserError("--artifact and --preset are both given; leave one out")
    if not (options.artifact or options.preset or others):
        raise UserError("there is no server to measure; give --artifact, --preset or --url")
    if options.llama_server is not None and options.parent is None and options.preset is None:
        raise UserError("--llama-server needs float weights; give --parent FP32_ARTIFACT, or --preset")
    prepare_output_file(options.out)
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.noise.meter import NoiseMeter
    from jaxgpt_bench.noise.verdict import warn
    from jaxgpt_bench.serving.measure import Alone, measure
    from jaxgpt_bench.serving.rows import ServingFigures
    from jaxgpt_bench.serving.servers import cpu_seconds_beside, llama_server, our_server

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:
        artifact = _artifact(options, Path(scratch))
        servers, alone = dict(others), None
        if artifact is not None:
            if options.llama_server is not None:
                parent = options.parent or Path(scratch) / "fp32"
                asked = options.llama_server, parent, Path(scratch)
                servers["llama-server"] = ends.enter_context(llama_server(*asked))
            servers = {"jaxgpt": ends.enter_context(our_server(artifact)), **servers}
            alone = Alone(artifact)
        meter = NoiseMeter(own_cpu_s=cpu_seconds_beside(others.values()))
        measured = asyncio.run(measure(options, servers, alone))
        noise = meter.noise(accepted=options.accept_noise)
    settings = {name: getattr(options, name) for name in SETTINGS}
    figures = ServingFigures(**measured, settings=settings, **vars(provenance(noise)))
    _show(figures)
    warn(noise)
    if options.out is not None:
        from jaxgpt_bench.serving.plot import write_serving_plots  # matplotlib takes a second

        write_json(options.out, figures.to_json())
        say(f"wrote {options.out} and {', '.join(map(str, write_serving_plots(figures, options.out)))}")
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


def _show(figures: "ServingFigures") -> None:
    from jaxgpt_bench.common.tables import table
    from jaxgpt_bench.serving.rows import LOAD, PROMPTS

    stderr.print(table(LOAD, figures.load).terminal())
    if figures.prompts:
        stderr.print(table(PROMPTS, figures.prompts).terminal())
    if figures.alone_tokens_per_s is not None:
        say(f"generate alone, greedy: {figures.alone_tokens_per_s.median:.0f} tokens/s, its prompt included")
