"""`jaxgpt-bench generate`: tokens a second, beside the ceiling that the memory sets.

    jaxgpt-bench generate --artifact ART... --tokens 250
    jaxgpt-bench generate --preset gpt2 --peers            (random weights: speed does not depend on them)

Every engine runs in a process of its own, with the same threads and in huge pages; in each round all of
them generate once, one after the other, so that a slow moment of the machine hits none alone; a few tokens
before that are not timed, as memory that lay still for minutes is read slowly at first. The ceiling is
measured read bandwidth / bytes that a token reads: weights, and the keys and values of the text so far (an
average over it), for every engine alike. Reading a buffer of just that size is what is measured, right
before and after the engine in each round. decode_tokens_per_s is the rate after the first token; seconds are
those of all tokens and of the prompt.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.generation.open_session import set_threads
from jaxgpt_export.native.library import instruction_sets

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.speed.contestants import chosen_peers, in_order, own_entries, peer_entries, with_cache
from jaxgpt_bench.speed.random_models import random_artifacts
from jaxgpt_bench.speed.rounds import (
    PROMPT_TOKENS,
    GenerateOptions,
    row,
    run_rounds,
    speed_table,
)


def generate(options: GenerateOptions) -> Result:
    """Run `jaxgpt-bench generate`."""
    if options.tokens < 2 or options.rounds < 1 or options.prefill < 1 or options.busy < 0:
        raise UserError(
            "--tokens must be at least 2, --rounds and --prefill at least 1, --busy must not be negative"
        )
    for isa in options.isa:
        if isa not in instruction_sets():
            here = ", ".join(instruction_sets()) or "there are none, as the native engine was not built"
            raise UserError(f"--isa {isa!r} is none of this machine's: {here}")
    wanted = chosen_peers(options.peers, options.peer)
    threads = set_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        folders = list(options.artifact)
        if options.preset is not None:
            if folders or options.run is not None:
                raise UserError("give --preset, or --artifact and --run, not both")
            folders = random_artifacts(options.preset, Path(scratch))
        artifacts = [read_artifact(folder) for folder in folders]
        if not artifacts:
            raise UserError("nothing to measure: give --artifact ART... or --preset NAME")
        config = artifacts[0].config
        if any(artifact.config != config for artifact in artifacts):
            raise UserError("the artifacts are of different models; measure them one after the other")
        length = min(PROMPT_TOKENS, config.block_size - options.tokens + 1)
        if length < 1:
            raise UserError(
                f"--tokens {options.tokens} does not fit the model's context of {config.block_size}"
            )
        prefill = min(options.prefill, config.block_size)
        line_up = own_entries(artifacts, options.run, options.uncached, threads, dict.fromkeys(options.isa))
        left_out: dict[str, str] = {}
        if wanted:
            peers, left_out = peer_entries(artifacts, wanted, Path(scratch), threads)
            line_up = in_order([*line_up, *peers])
        line_up = [with_cache(entry, config, length + options.tokens / 2) for entry in line_up]
        del artifacts
        draw = np.random.default_rng(0)
        prompts = [draw.integers(config.vocab_size - 1, size=size).tolist() for size in (length, prefill)]
        rounds, bandwidths, failed = run_rounds(line_up, prompts, options, threads)
    measured = [entry for entry in line_up if entry.name not in failed]
    reference = next((rounds[e.name][0]["tokens"] for e in measured if e.precision == "fp32"), None)
    rows = [row(entry, rounds[entry.name], prefill, reference) for entry in measured]
    figures = {
        **provenance(),
        "settings": {
            "preset": options.preset,
            "model": dataclasses.asdict(config),
            "tokens": options.tokens,
            "prompt_tokens": length,
            "prefill_tokens": prefill,
            "threads": threads,
            "busy_processes": options.busy,
            "batch": 1,
            "sampling": "greedy",
        },
        "rounds": options.rounds,
        "bandwidth_gb_s": [round(value, 2) for value in bandwidths],
        "left_out": {**left_out, **failed},
        "rows": rows,
    }
    stderr.print(speed_table(rows))
    if options.out is not None:
        write_json(options.out, figures)
        from jaxgpt_bench.common.plots import write_speed_plots  # matplotlib takes a second

        say(f"wrote {options.out} and {', '.join(map(str, write_speed_plots(figures, options.out)))}")
    return Result(figures)
