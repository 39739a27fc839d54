"""Interleaved rounds of `jaxgpt-bench generate`, each row beside its ceiling."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxgpt_export.format.artifact import Artifact

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import Noise, SpeedFigures, SpeedRound, SpeedRow, SpeedSettings, Spread
from jaxgpt_bench.common.timing import agreeing
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.noise.meter import NoiseMeter
from jaxgpt_bench.speed.contestants import (
    Contestant,
    in_order,
    not_in_engine,
    own_contestants,
    peer_contestants,
    with_cache,
)
from jaxgpt_bench.speed.options import SpeedOptions

PROMPT_TOKENS = 16

# Beside busy processes three times what takes a second when free is generated (16 tokens at least): one
# second holds few of the scheduler's turns.
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

Answer = dict[str, Any]  # of a contestant's process


def measure_speed(
    options: SpeedOptions, artifacts: list[Artifact], peers: Sequence[str], scratch: Path, threads: int
) -> SpeedFigures:
    """Measure this project's programs and the peers on the same model.

    Args:
      options: tokens, rounds and what else takes part.
      artifacts: of one model; the list is emptied before anything is timed, so that memory is free.
      peers: their engine names.
      scratch: for what peers load.
      threads: CPU threads.
    """
    config = artifacts[0].config
    length = min(PROMPT_TOKENS, config.block_size - options.tokens + 1)
    prefill = min(options.prefill, config.block_size)
    line_up = own_contestants(
        artifacts, options.run, options.uncached, threads, dict.fromkeys(options.isa), not options.native_only
    )
    left_out = not_in_engine(artifacts)
    if peers:
        others, failed = peer_contestants(artifacts, peers, scratch, threads)
        left_out |= failed
        line_up = in_order([*line_up, *others])
    line_up = [with_cache(each, config, length + options.tokens / 2) for each in line_up]
    tokenizer = artifacts[0].tokenizer() if options.preset is None else None  # random weights write no text
    artifacts.clear()
    draw = np.random.default_rng(0)
    prompt, long_prompt = (
        draw.integers(config.vocab_size - 1, size=size).tolist() for size in (length, prefill)
    )
    if not line_up:
        raise UserError("nothing to measure: no program that was asked for runs here")
    settings = SpeedSettings(
        preset=options.preset,
        model=dataclasses.asdict(config),
        tokens=options.tokens,
        prompt_tokens=length,
        prefill_tokens=prefill,
        threads=threads,
        busy_processes=options.busy,
    )
    rounds = Rounds(line_up, prompt, long_prompt, options, threads)
    figures = None
    for _ in rounds.run():
        figures = _figures(rounds, settings, left_out, tokenizer)
        if options.out is not None:  # so that a run that is cut short leaves the rounds that it had
            for suffix in (".svg", ".png"):  # of an earlier measurement
                options.out.with_suffix(suffix).unlink(missing_ok=True)
            write_json(options.out, figures.to_json())
    assert figures is not None
    return figures


def _figures(
    rounds: "Rounds", settings: SpeedSettings, left_out: Mapping[str, str], tokenizer: Tokenizer | None
) -> SpeedFigures:
    """Turn the rounds so far into rows."""
    answers = rounds.answers
    measured = [each for each in rounds.line_up if each.name not in rounds.failed]
    reference = next((answers[each.name][0]["tokens"] for each in measured if each.precision == "fp32"), None)
    return SpeedFigures(
        **vars(provenance(rounds.noise)),
        settings=settings,
        rounds=len(rounds.bandwidths),
        bandwidth_gb_s=tuple(round(value, 2) for value in rounds.bandwidths),
        left_out={**left_out, **rounds.failed},
        rows=tuple(
            speed_row(each, answers[each.name], settings.prefill_tokens, reference, tokenizer)
            for each in measured
        ),
    )


class Rounds:
    """Everyone generates in every round.

    Args:
      line_up: what is measured.
      prompt: that is continued.
      long_prompt: whose prefill is timed.
      options: tokens and rounds.
      threads: CPU threads.

    Attributes:
      answers: by row name, one a round, each with the bandwidth of a buffer of the contestant's size, read
        right before and right after.
      bandwidths: of a large buffer in each round, in 10^9 bytes a second.
      failed: the peers that did not run, with why.
      noise: of the machine during the rounds.
    """

    def __init__(
        self,
        line_up: Sequence[Contestant],
        prompt: list[int],
        long_prompt: list[int],
        options: SpeedOptions,
        threads: int,
    ) -> None:
        self.answers: dict[str, list[Answer]] = {each.name: [] for each in line_up}
        self.bandwidths: list[float] = []
        self.failed: dict[str, str] = {}
        self.noise: Noise | None = None
        self._line_up = {each.name: each for each in line_up}
        self._prompt, self._long_prompt, self._options = prompt, long_prompt, options
        self._threads = threads
        self._workers: list[Worker] = []
        self._environments: dict[str, dict[str, str]] = {}

    @property
    def line_up(self) -> list[Contestant]:
        """What is measured."""
        return list(self._line_up.values())

    def run(self) -> Iterator[None]:
        """Start all, yield after each round, end all; a peer that stops is left out.

        Raises:
          UserError: one of this project's programs stopped.
        """
        try:
            for contestant in self._line_up.values():
                self._start(contestant)
            meter = NoiseMeter()
            for number in range(self._options.rounds):
                self.bandwidths.append(read_bandwidth(BANDWIDTH_BUFFER_BYTES, self._threads))
                for worker in list(self._workers):
                    with self._left_out_if_it_stops(worker):
                        answer = self._timed(worker)
                        self.answers[worker.name].append(answer)
                        rate = (self._options.tokens - 1) / answer["decode_s"]
                        say(f"round {number + 1}/{self._options.rounds}  {worker.name}: {rate:.1f} tokens/s")
                with busy_processes(self._options.busy):
                    for worker in list(self._workers) if self._options.busy else []:
                        if self._line_up[worker.name].variant.cached:
                            # Without a cache later tokens take longer, so that fewer tell nothing.
                            with self._left_out_if_it_stops(worker):
                                self._timed_beside_others(worker)
                self.noise = meter.noise(self.bandwidths, self._options.accept_noise)
                yield
        finally:
            for worker in self._workers:
                worker.close()

    def _warmup(self) -> dict[str, Any]:
        return {"prompt": self._prompt, "count": min(WARMUP_TOKENS, self._options.tokens)}

    def _start(self, contestant: Contestant) -> None:
        """Start a process and let it warm up; a peer that can't is left out."""
        say(f"loading {contestant.name}")
        question = self._warmup()
        with self._left_out_if_it_stops(contestant):
            worker, environment = contestant.start(question["prompt"], question["count"])
            self._environments[contestant.name] = environment
            self._workers.append(worker)
            worker.ask({"prompt": self._long_prompt, "count": 1})

    @contextlib.contextmanager
    def _left_out_if_it_stops(self, of: Contestant | Worker) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self._line_up[of.name].is_peer:
                raise UserError(f"{error}; --out has the rounds before it") from None
            self.failed[of.name] = str(error)
            for worker in [worker for worker in self._workers if worker.name == of.name]:
                worker.close()
                self._workers.remove(worker)
            say(f"{of.name} is left out: {error}")

    def _timed(self, worker: Worker) -> Answer:
        """Time one text and the long prompt, between two readings of a buffer of the contestant's size."""
        size = self._line_up[worker.name].bytes_per_token
        before = read_bandwidth(size, self._threads)
        worker.ask(self._warmup())
        answer = worker.ask({"prompt": self._prompt, "count": self._options.tokens})
        after = read_bandwidth(size, self._threads)
        prefilled = worker.ask({"prompt": self._long_prompt, "count": 1})
        return {
            **answer,
            "long_prefill_s": prefilled["prefill_s"],
            "environment": self._environments[worker.name],
            "read_gb_s": (before + after) / 2,
        }

    def _timed_beside_others(self, worker: Worker) -> None:
        """Time the contestant once more while other processes compete for the cores."""
        free = self.answers[worker.name][-1]
        rate = (self._options.tokens - 1) / free["decode_s"]
        count = min(max(int(rate * BUSY_SECONDS), BUSY_TOKENS), self._options.tokens)
        question = {"prompt": self._prompt, "count": count}
        seconds = sum(worker.ask(question)["decode_s"] for _ in range(BUSY_PASSES))
        free["busy_rate"] = BUSY_PASSES * (count - 1) / seconds


def speed_row(
    contestant: Contestant,
    answers: Sequence[Answer],
    prefill: int,
    reference: Sequence[int] | None,
    tokenizer: Tokenizer | None = None,
) -> SpeedRow:
    """Turn a contestant's answers into its row.

    Args:
      contestant: what was measured.
      answers: one a round.
      prefill: tokens of the long prompt.
      reference: the float32 artifact's greedy tokens; None where it was not measured.
      tokenizer: of the model; None where its tokens mean nothing.
    """
    size = contestant.bytes_per_token
    by_round = [speed_round(answer, size) for answer in answers]
    rates, shares = [each.tokens_per_s for each in by_round], [each.ceiling_share for each in by_round]
    read = statistics.median(answer["read_gb_s"] for answer in answers)
    tokens = answers[0]["tokens"]
    busy = [answer["busy_rate"] for answer in answers if "busy_rate" in answer]
    whole = len(busy) == len(answers)
    return SpeedRow(
        engine=contestant.program.engine,
        precision=contestant.precision,
        **dataclasses.asdict(contestant.variant),
        decode_tokens_per_s=Spread.of(rates),
        prefill_tokens_per_s=Spread.of([prefill / answer["long_prefill_s"] for answer in answers]),
        seconds=Spread.of([answer["prefill_s"] + answer["decode_s"] for answer in answers]),
        bytes_per_token=size,
        read_gb_s=read,
        ceiling_tokens_per_s=read * 1e9 / size,
        ceiling_share=statistics.median(shares),
        ceiling_shares=Spread.of(shares),
        by_round=tuple(by_round),
        characters_per_s=None if tokenizer is None else characters_per_s(answers, tokenizer),
        file_mb=contestant.file_bytes / 1e6,
        peak_rss_mb=max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        busy_tokens_per_s=Spread.of(busy) if whole else None,
        busy_share=statistics.median(slow / free for slow, free in zip(busy, rates, strict=True))
        if whole
        else None,
        settings={**contestant.settings, **answers[0]["environment"]},
        greedy_agrees=None if reference is None else agreeing(reference, tokens),
        greedy_tokens=tuple(tokens),
    )


def speed_round(answer: Answer, size: int) -> SpeedRound:
    """Set a round's rate beside the ceiling of the same round.

    Args:
      answer: of the contestant.
      size: bytes that a token reads.
    """
    rate, ceiling = (len(answer["tokens"]) - 1) / answer["decode_s"], answer["read_gb_s"] * 1e9 / size
    return SpeedRound(
        tokens_per_s=rate,
        read_gb_s=answer["read_gb_s"],
        ceiling_tokens_per_s=ceiling,
        ceiling_share=rate / ceiling,
    )


def characters_per_s(answers: Sequence[Answer], tokenizer: Tokenizer) -> Spread:
    """Return the rates of the text that the tokens after the first add."""
    return Spread.of(
        [
            (len(tokenizer.decode(answer["tokens"])) - len(tokenizer.decode(answer["tokens"][:1])))
            / answer["decode_s"]
            for answer in answers
        ]
    )


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let so many processes compute and do nothing else, at most as long as this one lives."""
    program = [sys.executable, "-c", BUSY]
    processes = [subprocess.Popen(program, process_group=0) for _ in range(count)]  # Ctrl-C is not for them
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
