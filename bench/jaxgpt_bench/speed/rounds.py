"""Interleaved rounds of `jaxgpt-bench generate`, each row beside its ceiling."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxgpt.shared.console import say
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.workers import Worker, spread
from jaxgpt_bench.quality.agreement import agreeing
from jaxgpt_bench.speed.contestant_process import row_name
from jaxgpt_bench.speed.contestants import Entry

PROMPT_TOKENS = 16
# Beside busy processes an engine generates three times what takes it a second when free (16 tokens at least):
# one second holds few of the scheduler's turns.
BUSY_SECONDS, BUSY_TOKENS, BUSY_PASSES = 1.0, 16, 3
WARMUP_TOKENS = 8
BANDWIDTH_BUFFER_BYTES = 1_000_000_000
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Measure generation speed, batch 1, greedy.

    Attributes:
      artifact: artifact folders.
      run: run folder: its Flax model is measured too.
      preset: measure a model of this shape with random weights, in float32 and quantized in every way.
      tokens: to generate in each round.
      threads: CPU threads; 0 takes all cores that this process may use.
      rounds: in each of which every engine generates once.
      isa: the native engine also with these instruction sets (avx2, portable, ...).
      uncached: also without KV cache (slow: every token runs the whole text again).
      busy: so many other processes compete for the cores in one more pass of each round; in it engines
        with a KV cache generate three times what takes them a second when free; 0 leaves it out.
      prefill: tokens of a prompt that is timed as well in each round; a shorter context bounds it.
      peers: also every other program that is installed, with the same float32 weights: see the folder peers.
        transformers' GPT-2 runs with its cache, without, and without and with the logits of every position
        (`model(ids).logits[:, -1]`, the original project's way).
      peer: only these of them, by their engine names.
      out: also write the figures into this JSON file, and a plot beside it (.svg, .png).
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...] = ()
    run: Path | None = None
    preset: str | None = None
    tokens: int = 250
    threads: int = 0
    rounds: int = 3
    isa: tuple[str, ...] = ()
    uncached: bool = False
    busy: int = 0
    prefill: int = 512
    peers: bool = False
    peer: tuple[str, ...] = ()
    out: Path | None = None
    json: bool = False


def run_rounds(
    line_up: Sequence[Entry], prompts: Sequence[list[int]], options: GenerateOptions, threads: int
) -> tuple[dict[str, list[dict[str, Any]]], list[float], dict[str, str]]:
    """Generate in every round with every engine.

    Args:
      line_up: what is measured.
      prompts: the one that is continued, and the one whose prefill is timed.
      options: tokens and rounds.
      threads: CPU threads.

    Returns:
      The answers by row name, each with the bandwidth of a buffer of the engine's size, read right before
      and right after; the bandwidth of a large buffer in each round, in 10^9 bytes a second; and the peers
      that did not run, with why.
    """
    warmup = min(WARMUP_TOKENS, options.tokens)
    workers: list[Worker] = []
    failed: dict[str, str] = {}
    environments: dict[str, dict[str, str]] = {}
    answers: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in line_up}
    bandwidths: list[float] = []
    prompt, long_prompt = prompts
    try:
        for entry in line_up:
            say(f"loading {entry.name}")
            try:
                worker, environments[entry.name] = entry.start(prompt, warmup)
                workers.append(worker)
                workers[-1].ask({"prompt": long_prompt, "count": 1})
            except (RuntimeError, BrokenPipeError) as error:
                if not entry.is_peer:
                    raise
                failed[entry.name] = str(error)
                workers = [worker for worker in workers if worker.name != entry.name]
                say(f"{entry.name} is left out: {error}")
        sizes = {entry.name: entry.bytes_per_token for entry in line_up}
        cached = {entry.name for entry in line_up if entry.contestant.cached}
        for number in range(options.rounds):
            bandwidths.append(read_bandwidth(BANDWIDTH_BUFFER_BYTES, threads))
            for worker in workers:
                size = sizes[worker.name]
                before = read_bandwidth(size, threads)
                worker.ask({"prompt": prompt, "count": warmup})
                answer = worker.ask({"prompt": prompt, "count": options.tokens})
                after = read_bandwidth(size, threads)
                prefilled = worker.ask({"prompt": long_prompt, "count": 1})
                more = {"long_prefill_s": prefilled["prefill_s"], "environment": environments[worker.name]}
                answers[worker.name].append({**answer, **more, "read_gb_s": (before + after) / 2})
                rate = (options.tokens - 1) / answer["decode_s"]
                say(f"round {number + 1}/{options.rounds}  {worker.name}: {rate:.1f} tokens/s")
            if options.busy:
                with busy_processes(options.busy):
                    for worker in workers:
                        if worker.name not in cached:
                            continue  # its later tokens take longer, so that fewer tell nothing
                        free = answers[worker.name][-1]
                        rate = (options.tokens - 1) / free["decode_s"]
                        count = min(max(int(rate * BUSY_SECONDS), BUSY_TOKENS), options.tokens)
                        passes = [worker.ask({"prompt": prompt, "count": count}) for _ in range(BUSY_PASSES)]
                        seconds = sum(answer["decode_s"] for answer in passes)
                        free["busy_rate"] = BUSY_PASSES * (count - 1) / seconds
    finally:
        for worker in workers:
            worker.close()
    return answers, bandwidths, failed


def row(
    entry: Entry,
    answers: Sequence[dict[str, Any]],
    prefill: int,
    reference: Sequence[int] | None,
) -> dict[str, Any]:
    """Turn an engine's answers into its row.

    Args:
      entry: what was measured.
      answers: one a round.
      prefill: tokens of the long prompt.
      reference: the float32 artifact's greedy tokens; None where it was not measured.
    """
    size = entry.bytes_per_token
    rates = [(len(answer["tokens"]) - 1) / answer["decode_s"] for answer in answers]
    shares = [rate * size / 1e9 / answer["read_gb_s"] for rate, answer in zip(rates, answers, strict=True)]
    decode = spread(rates)
    read = statistics.median(answer["read_gb_s"] for answer in answers)
    tokens = answers[0]["tokens"]
    contestant = entry.contestant
    return {
        "engine": contestant.engine,
        "precision": contestant.precision,
        "cached": contestant.cached,
        "every_logit": contestant.every_logit,
        "isa": contestant.isa,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": spread([prefill / answer["long_prefill_s"] for answer in answers]),
        "seconds": spread([answer["prefill_s"] + answer["decode_s"] for answer in answers]),
        "bytes_per_token": size,
        "read_gb_s": read,
        "ceiling_tokens_per_s": read * 1e9 / size,
        "ceiling_share": statistics.median(shares),
        "file_mb": entry.file_bytes / 1e6,
        "peak_rss_mb": max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        **busy_figures(rates, answers),
        "settings": {**entry.settings, **answers[0]["environment"]},
        "greedy_agrees": None if reference is None else agreeing(reference, tokens),
        "greedy_tokens": tokens,
    }


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let so many processes compute and do nothing else, at most as long as this one lives."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy_figures(rates: Sequence[float], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates beside busy processes, and their share of each round's free rate."""
    if not all("busy_rate" in answer for answer in answers):
        return {}
    busy = [answer["busy_rate"] for answer in answers]
    shares = [slow / free for slow, free in zip(busy, rates, strict=True)]
    return {"busy_tokens_per_s": spread(busy), "busy_share": statistics.median(shares)}


def speed_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out for a terminal."""
    table = Table(
        "engine", "s", "later tokens/s", "min-max", "of ceiling", "prefill/s", "file MB", "peak MB", "same"
    )
    for line in rows:
        decode = line["decode_tokens_per_s"]
        table.add_row(
            row_name(line),
            f"{line['seconds']['median']:.2f}",
            f"{decode['median']:.1f}",
            f"{decode['min']:.0f}-{decode['max']:.0f}",
            f"{line['ceiling_share']:.0%}",
            f"{line['prefill_tokens_per_s']['median']:.0f}",
            f"{line['file_mb']:.1f}",
            f"{line['peak_rss_mb']:.0f}",
            "" if line["greedy_agrees"] is None else str(line["greedy_agrees"]),
        )
    return table
