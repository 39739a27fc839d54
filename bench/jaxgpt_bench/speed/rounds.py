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
from jaxgpt_bench.common.bandwidth import LARGE_BUFFER, read_bandwidth
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
from jaxgpt_bench.speed.trials import Entrant, close, fastest, started

PROMPT_TOKENS = 16

# Beside busy processes three times what takes a second when free is generated (16 tokens at least): one
# second holds few of the scheduler's turns.
BUSY_SECONDS, BUSY_TOKENS, BUSY_PASSES = 1.0, 16, 3
BESIDE_OTHERS = ", beside busy processes"
WARMUP_TOKENS, TRIAL_TOKENS = 8, 60
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
        self._decoding: dict[str, Entrant] = {}  # by row name, who generates; and who takes prompts
        self._prompted: dict[str, Entrant] = {}

    @property
    def line_up(self) -> list[Contestant]:
        """What is measured."""
        return list(self._line_up.values())

    def run(self) -> Iterator[None]:
        """Start all, yield after each round, end all; then once more beside busy processes, if so many are.

        A peer that stops is left out.

        Raises:
          UserError: one of this project's programs stopped.
        """
        try:
            for contestant in self.line_up:
                self._start(contestant)
            meter = NoiseMeter()
            for number in range(self._options.rounds):
                self.bandwidths.append(read_bandwidth(LARGE_BUFFER, self._threads))
                for name in list(self._decoding):
                    with self._left_out_if_it_stops(name):
                        answer = self._timed(name)
                        self.answers[name].append(answer)
                        rate = (self._options.tokens - 1) / answer["decode_s"]
                        say(f"round {number + 1}/{self._options.rounds}  {name}: {rate:.1f} tokens/s")
                self._listen(meter)
                yield
            if self._options.busy:
                self._close()
                self._run_beside_others()
                self._listen(meter)
                yield
        finally:
            self._close()

    def _listen(self, meter: NoiseMeter) -> None:
        """Note the noise; readings are as far apart as the large buffer's, or as most rows' if further."""
        rows = [[answer["read_gb_s"] for answer in answers] for answers in self.answers.values() if answers]
        first, *others = (
            (max(each) - min(each)) / statistics.median(each) for each in (self.bandwidths, *rows)
        )
        spread = max(first, statistics.median(others or [first]))
        noise = meter.noise(self.bandwidths, self._options.accept_noise)
        self.noise = dataclasses.replace(noise, probe_spread=spread)

    def _close(self) -> None:
        close([*self._decoding.values(), *self._prompted.values()])
        self._decoding.clear()
        self._prompted.clear()

    def _warm_up(self, worker: Worker) -> None:
        worker.ask({"prompt": self._prompt, "count": min(WARMUP_TOKENS, self._options.tokens)})

    def _start(self, contestant: Contestant) -> None:
        """Start it in every way; keep the one that generates fastest, and the one that takes prompts so."""
        name = contestant.name
        say(f"loading {name}")
        trial = {"prompt": self._prompt, "count": min(TRIAL_TOKENS, self._options.tokens)}
        prompt = {"prompt": self._long_prompt, "count": 1}

        def warm_up(worker: Worker) -> None:
            self._warm_up(worker)
            worker.ask(prompt)

        with self._left_out_if_it_stops(name):
            entrants = started(contestant, warm_up)
            decoding = fastest(entrants, lambda worker: float(worker.ask(trial)["decode_s"]))
            prompted = fastest(entrants, lambda worker: float(worker.ask(prompt)["prefill_s"]))
            close(entrants, but=(decoding, prompted))
            self._decoding[name], self._prompted[name] = decoding, prompted

    @contextlib.contextmanager
    def _left_out_if_it_stops(self, name: str, of: str = "") -> Iterator[None]:
        """Leave out a peer that stops, or where `of` says so, that figure of it."""
        try:
            yield
        except RuntimeError as error:
            if not self._line_up[name].is_peer:
                raise UserError(f"{error}; --out has the rounds before it") from None
            self.failed[f"{name}{of}"] = str(error)
            for entrants in (self._decoding, self._prompted):
                if name in entrants:
                    entrants.pop(name).worker.close()
            say(f"{name}{of} is left out: {error}")

    def _timed(self, name: str) -> Answer:
        """Time one text and the long prompt, between two readings of a buffer of the contestant's size."""
        size, decoding, prompted = (
            self._line_up[name].bytes_per_token,
            self._decoding[name],
            self._prompted[name],
        )
        before = read_bandwidth(size, self._threads)
        self._warm_up(decoding.worker)
        answer = decoding.worker.ask({"prompt": self._prompt, "count": self._options.tokens})
        after = read_bandwidth(size, self._threads)
        if prompted.worker is not decoding.worker:
            self._warm_up(prompted.worker)
        prefilled = prompted.worker.ask({"prompt": self._long_prompt, "count": 1})
        return {
            **answer,
            "long_prefill_s": prefilled["prefill_s"],
            "settings": decoding.choice.said,
            "prompt_settings": prompted.choice.said,
            "read_gb_s": (before + after) / 2,
            "read_before_gb_s": before,
            "read_after_gb_s": after,
        }

    def _run_beside_others(self) -> None:
        """Time all once more in each round while other processes compete for the cores.

        Without a KV cache later tokens take longer, so that the few that are made here would tell nothing.
        """
        for contestant in self.line_up:
            if contestant.variant.cached and contestant.name not in self.failed:
                self._start_beside_others(contestant)
        for number in range(self._options.rounds):
            with busy_processes(self._options.busy):
                for name in list(self._decoding):
                    with self._left_out_if_it_stops(name, BESIDE_OTHERS):
                        answer = self.answers[name][number]
                        answer["busy_rate"] = self._rate_beside_others(self._decoding[name].worker)
                        answer["busy_settings"] = self._decoding[name].choice.said
                        say(f"round {number + 1}, beside others  {name}: {answer['busy_rate']:.1f} tokens/s")

    def _start_beside_others(self, contestant: Contestant) -> None:
        """Start it in every way again, and keep the one that is fastest beside busy processes."""
        with self._left_out_if_it_stops(contestant.name, BESIDE_OTHERS):
            entrants = started(contestant, self._warm_up)
            with busy_processes(self._options.busy if len(entrants) > 1 else 0):
                chosen = fastest(entrants, lambda worker: 1 / self._rate_beside_others(worker, passes=1))
            close(entrants, but=(chosen,))
            self._decoding[contestant.name] = chosen

    def _rate_beside_others(self, worker: Worker, passes: int = BUSY_PASSES) -> float:
        """Return tokens a second while others compute, of so many passes of BUSY_SECONDS when free."""
        free = statistics.median(answer["decode_s"] for answer in self.answers[worker.name])
        rate = (self._options.tokens - 1) / free
        count = min(max(int(rate * BUSY_SECONDS), BUSY_TOKENS), self._options.tokens)
        question = {"prompt": self._prompt, "count": count}
        return passes * (count - 1) / sum(worker.ask(question)["decode_s"] for _ in range(passes))


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
    settings = answers[0]["settings"]
    otherwise = {use: answers[0].get(f"{use}_settings", settings) for use in ("prompt", "busy")}
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
        busy_share=statistics.median(busy) / statistics.median(rates) if whole else None,
        settings=settings,
        prompt_settings=otherwise["prompt"] if otherwise["prompt"] != settings else None,
        busy_settings=otherwise["busy"] if whole and otherwise["busy"] != settings else None,
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
        read_before_gb_s=answer.get("read_before_gb_s"),
        read_after_gb_s=answer.get("read_after_gb_s"),
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
