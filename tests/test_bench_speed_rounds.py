"""Rounds of `jaxgpt-bench generate` that do not come to their end, and line-ups that can't be measured."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.rows import Noise, Spread
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.noise.meter import NoiseMeter
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import Choice, Peer, Variant
from jaxgpt_bench.speed.contestants import Contestant, weight_bytes
from jaxgpt_bench.speed.native.rounds import WAYS, Counts, NativeRounds, continued, rate_of
from jaxgpt_bench.speed.options import SpeedOptions
from jaxgpt_bench.speed.programs import NATIVE
from jaxgpt_bench.speed.random_models import placeholder_tokenizer
from jaxgpt_bench.speed.rounds import BESIDE_OTHERS, Rounds, speed_row
from jaxgpt_bench.speed.trials import TRIALS, Entrant, close, fastest, started
from jaxgpt_export.format.artifact import read_artifact
from tiny_artifacts import SHAPE, tiny_artifacts

from jaxgpt.generation.state import Generation
from jaxgpt.shared.errors import UserError

PEER = next(iter(find_peers().values()))


class Scripted(Worker):
    """A worker that stops at a question, as one does that the system ended for its memory."""

    def __init__(self, name: str, questions: int) -> None:
        self.name, self._left, self.closed = name, questions, False

    def ask(self, question: Any) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError(f"{self.name} stopped with code -9")
        return {"decode_s": 1.0, "prefill_s": 1.0, "tokens": [1] * question["count"]}

    def close(self) -> None:
        self.closed = True


def rounds_of(monkeypatch: pytest.MonkeyPatch, **questions: int) -> tuple[Rounds, dict[str, Scripted]]:
    """Return rounds of this project's engine and a peer, which stop after so many questions."""
    programs = {"ours": NATIVE, "peer": PEER}
    line_up = [
        Contestant(
            program=programs[name],
            precision="fp32",
            path=Path(),
            threads=1,
            bytes_per_token=1000,
            file_bytes=1,
        )
        for name in questions
    ]
    workers = {
        each.name: Scripted(each.name, count) for each, count in zip(line_up, questions.values(), strict=True)
    }
    monkeypatch.setattr(
        "jaxgpt_bench.speed.rounds.started", lambda of, warm_up: [Entrant(workers[of.name], Choice())]
    )
    monkeypatch.setattr("jaxgpt_bench.speed.rounds.read_bandwidth", lambda size, threads: 10.0)
    return Rounds(line_up, [1, 2], [1, 2, 3], SpeedOptions(tokens=4, rounds=3), 1), workers


def test_a_peer_that_stops_in_a_round_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, workers = rounds_of(monkeypatch, ours=100, peer=3 + 1)  # the second round's warm-up
    assert len(list(rounds.run())) == 3
    ours, peer = rounds.answers
    assert len(rounds.answers[ours]) == 3
    assert rounds.failed == {peer: f"{peer} stopped with code -9"}
    assert all(worker.closed for worker in workers.values())


def test_this_project_s_own_program_that_stops_ends_the_rounds_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, workers = rounds_of(monkeypatch, ours=3)
    running = rounds.run()
    next(running)
    with pytest.raises(UserError, match="stopped with code -9; --out has the rounds before it"):
        next(running)
    assert all(worker.closed for worker in workers.values())


class TwoWays(Peer):
    """A program whose two ways are each the fastest at something."""

    engine = "two-ways"
    modules = ()
    precisions = ("fp32",)
    environments = ({}, {"OMP_WAIT_POLICY": "PASSIVE"})


class Timed(Worker):
    """A worker that says how long it took: `times` are of a token, of a prompt, of a token beside others."""

    busy = False
    stop_at_once = False

    def __init__(self, name: str, times: tuple[float, float, float], stops: bool = False) -> None:
        self.name, self.closed, self.asked, self._times, self._stops = name, False, 0, times, stops

    def ask(self, question: Any) -> dict[str, Any]:
        if self.stop_at_once or (self._stops and Timed.busy):
            raise RuntimeError(f"{self.name} stopped with code -9")
        self.asked += 1
        token, prompt, beside = self._times
        each = beside if Timed.busy else token
        count = question["count"]
        return {
            "decode_s": (count - 1) * each,
            "prefill_s": prompt,
            "tokens": [1] * count,
            "peak_rss_bytes": 1,
        }

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Timed]:
    """Processes start as `Timed`, spinning ones fast until others compute; all that were started."""
    all_started: list[Timed] = []

    def process(contestant: Contestant, choice: Choice) -> Timed:
        spins = not choice.environment
        times = (0.01, 2.0, 1.0) if spins else (0.02, 1.0, 0.04)
        all_started.append(Timed(contestant.name, times, stops=contestant.variant.every_logit))
        return all_started[-1]

    @contextlib.contextmanager
    def busy(count: int) -> Iterator[None]:
        Timed.busy = count > 0
        yield
        Timed.busy = False

    monkeypatch.setattr("jaxgpt_bench.speed.trials._process", process)
    monkeypatch.setattr("jaxgpt_bench.speed.rounds.busy_processes", busy)
    monkeypatch.setattr("jaxgpt_bench.speed.rounds.read_bandwidth", lambda size, threads: 10.0)
    return all_started


def two_ways(every_logit: bool = False) -> Contestant:
    variant = Variant(every_logit=every_logit)
    return Contestant(
        program=TwoWays(), precision="fp32", path=Path(), threads=1, variant=variant, bytes_per_token=1000,
        file_bytes=1,
    )  # fmt: skip


def test_a_program_generates_takes_prompts_and_runs_beside_others_each_in_its_fastest_way(
    machine: list[Timed],
) -> None:
    contestant = two_ways()
    rounds = Rounds([contestant], [1, 2], [1, 2, 3], SpeedOptions(tokens=5, rounds=2, busy=1), 1)
    assert len(list(rounds.run())) == 3  # two free, one that adds what is left beside others
    row = speed_row(contestant, rounds.answers[contestant.name], 512, None)
    assert row.decode_tokens_per_s.median == pytest.approx(1 / 0.01)
    assert row.prefill_tokens_per_s.median == pytest.approx(512 / 1.0)
    assert row.busy_tokens_per_s is not None
    assert row.busy_tokens_per_s.median == pytest.approx(1 / 0.04)
    assert row.busy_share == pytest.approx(0.01 / 0.04)
    assert (row.settings, row.prompt_settings) == ({}, {"OMP_WAIT_POLICY": "PASSIVE"})
    assert row.busy_settings == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert all(worker.closed for worker in machine)
    same = speed_row(
        contestant, [{**each, "prompt_settings": {}} for each in rounds.answers[row.name]], 512, None
    )
    assert same.prompt_settings is None
    assert "prompt_settings" not in same.to_json()


def test_a_program_that_stops_beside_others_keeps_its_free_figures(machine: list[Timed]) -> None:
    stops, other = two_ways(every_logit=True), two_ways()
    rounds = Rounds([stops, other], [1, 2], [1, 2, 3], SpeedOptions(tokens=5, rounds=2, busy=1), 1)
    assert len(list(rounds.run())) == 3
    assert list(rounds.failed) == [stops.name + BESIDE_OTHERS]
    rows = [speed_row(each, rounds.answers[each.name], 512, None) for each in (stops, other)]
    assert [row.busy_tokens_per_s is None for row in rows] == [True, False]
    assert [row.busy_settings is None for row in rows] == [True, False]
    assert all(worker.closed for worker in machine)


def test_a_program_that_stopped_in_a_round_is_not_started_again_beside_others(machine: list[Timed]) -> None:
    stops, other = two_ways(every_logit=True), two_ways()
    rounds = Rounds([stops, other], [1, 2], [1, 2, 3], SpeedOptions(tokens=5, rounds=3, busy=1), 1)
    running = rounds.run()
    next(running)
    for worker in machine:
        if worker.name == stops.name:
            worker.stop_at_once = True
    assert len(list(running)) == 3  # two more that are free, one beside others
    assert list(rounds.failed) == [stops.name]
    assert len(rounds.answers[stops.name]) == 1
    assert rounds.answers[other.name][2]["busy_rate"] == pytest.approx(1 / 0.04)


def test_noise_is_listened_to_until_the_end_also_where_nobody_answers(
    machine: list[Timed], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    noise = NoiseMeter.noise

    def counted(self: NoiseMeter, probes: Sequence[float] = (), accepted: bool = False) -> Noise:
        heard.append(len(probes))
        return noise(self, probes, accepted)

    monkeypatch.setattr(NoiseMeter, "noise", counted)
    asked = SpeedOptions(tokens=5, rounds=2, busy=1)
    assert len(list(Rounds([two_ways()], [1, 2], [1, 2, 3], asked, 1).run())) == 3
    assert heard == [1, 2, 2]
    nobody = Rounds([two_ways()], [1, 2], [1, 2, 3], dataclasses.replace(asked, busy=0), 1)
    monkeypatch.setattr("jaxgpt_bench.speed.trials._process", stopped_at_its_start)
    assert len(list(nobody.run())) == 2
    assert nobody.noise is not None
    assert nobody.noise.probe_spread == 0.0
    assert list(nobody.failed) == [two_ways().name]


def stopped_at_its_start(contestant: Contestant, choice: Choice) -> Timed:
    raise RuntimeError(f"{contestant.name} stopped with code 1")


def test_a_way_that_can_t_be_opened_is_passed_over(
    machine: list[Timed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(contestant: Contestant, choice: Choice) -> Timed:
        if choice.environment:
            raise RuntimeError("this build has no such threads")
        machine.append(Timed(contestant.name, (1.0, 1.0, 1.0)))
        return machine[-1]

    monkeypatch.setattr("jaxgpt_bench.speed.trials._process", opened)
    (only,) = started(two_ways(), lambda worker: None)
    assert not only.choice.environment
    assert not machine[0].closed


def test_a_way_that_does_not_start_is_passed_over_and_one_that_is_twice_as_slow_not_tried_again(
    machine: list[Timed],
) -> None:
    contestant = two_ways()

    def no_spinning(worker: Worker) -> None:
        if worker is machine[0]:
            raise RuntimeError("it needs more cores")

    (only,) = started(contestant, no_spinning)
    assert only.choice.environment == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert [worker.closed for worker in machine] == [True, False]

    def never(worker: Worker) -> None:
        raise RuntimeError("it needs more memory")

    with pytest.raises(RuntimeError, match="more memory"):
        started(contestant, never)
    assert [worker.closed for worker in machine] == [True, False, True, True]
    machine.clear()
    both = started(contestant, lambda worker: None)
    for ratio, tries in ((1.9, TRIALS), (2.0, 1)):
        for worker in machine:
            worker.asked = 0

        def seconds(worker: Any, ratio: float = ratio) -> float:
            worker.asked += 1
            return ratio if worker is machine[0] else 1.0

        assert fastest(both, seconds) is both[1]
        assert [worker.asked for worker in machine] == [tries, tries]
    slow_once = iter([1.0, 1.1, 9.0, 1.1, 1.0, 1.1, 1.0, 1.1, 1.0, 1.1])
    assert fastest(both, lambda worker: next(slow_once)) is both[0]  # what disturbs one pass decides nothing
    close(both, but=both[:1])
    assert [worker.closed for worker in machine] == [False, True]


def test_a_row_is_of_each_round_s_own_figures() -> None:
    contestant = Contestant(
        program=NATIVE, precision="fp32", path=Path(), threads=1, bytes_per_token=10**9, file_bytes=1
    )
    times = (
        (0.5, 2.0, 4.0),
        (0.25, 1.0, 1.0),
        (1.0, 3.0, 2.0),
    )
    answers = [
        {
            "tokens": [1] * 5, "prefill_s": prefill, "decode_s": decode, "long_prefill_s": long,
            "read_gb_s": 8.0, "peak_rss_bytes": 1, "settings": {},
        }
        for prefill, decode, long in times
    ]  # fmt: skip
    row = speed_row(contestant, answers, 512, None)
    assert row.prefill_tokens_per_s == Spread(median=256.0, min=128.0, max=512.0)
    assert row.seconds == Spread(median=2.5, min=1.25, max=4.0)
    assert row.decode_tokens_per_s == Spread(median=2.0, min=4 / 3, max=4.0)
    assert row.ceiling_share == 2.0 / 8.0


class Recording:
    """A session that keeps the prompt and goes on with one token."""

    block_size = 32

    def __init__(self, token: int) -> None:
        self._logits = np.eye(SHAPE.vocab_size, dtype=np.float32)[token]
        self.prompt: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> Any:
        self.prompt = list(tokens)
        return self._logits

    def decode(self, token: int) -> Any:
        return self._logits


def test_drafts_are_timed_on_the_tokens_of_the_prompt_itself() -> None:
    """A text that was cut anywhere has other tokens once it is decoded and encoded again."""
    tokenizer = placeholder_tokenizer(SHAPE.vocab_size)
    pair = tokenizer.encode("!!")
    prompt = [*tokenizer.encode("!"), *tokenizer.encode("!")]
    assert (len(pair), tokenizer.decode(prompt)) == (1, "!!")
    session = Recording(pair[0])
    assert continued(session, tokenizer, prompt, 5, 0).tokens == 5 * pair
    assert session.prompt == prompt
    assert continued(Recording(tokenizer.endoftext), tokenizer, prompt, 5, 0).tokens == [tokenizer.endoftext]


def test_drafts_are_held_against_the_same_texts_without() -> None:
    def text(tokens: int, seconds: float) -> Generation:
        return Generation("", [1] * tokens, "endoftext", 0.1, seconds)

    assert rate_of([text(11, 1.0), text(31, 3.0)]) == 40 / 4
    rounds = object.__new__(NativeRounds)
    rounds._prompts, rounds._count, rounds._texts = [[1]], 10, 2
    rates = {"plain": 10.0, "screen": 20.0, "guess": 45.0, "without_guess": 15.0}
    rounds._rates = {name: [rates.get(name, 1.0)] * 2 for name in WAYS}
    rounds._counts = Counts(characters={"plain": 30, "guess": 8}, tokens={"plain": 10, "guess": 4})
    figures = rounds._figures(2)
    assert (figures["guess"]["times_screened"], figures["guess"]["times_plain"]) == (3.0, 6.0)
    found = {name: rate["median"] for name, rate in figures["characters_per_s"].items()}
    assert found == {"plain": 30.0, "screen": 60.0, "guess": 90.0}


def test_layers_of_4_bits_with_rounded_inputs_are_read_as_two_matrices_of_8(tmp_path: Path) -> None:
    """Those of weight-only ones are read in float32, and no other layer is read twice."""
    folders = tiny_artifacts(tmp_path)
    C, blocks, head = SHAPE.n_embd, SHAPE.n_layer * 12 * SHAPE.n_embd**2, SHAPE.vocab_size * SHAPE.n_embd
    vectors = 4 * (SHAPE.n_layer * 13 * C + 2 * C)
    scales = 4 * (SHAPE.vocab_size + SHAPE.n_layer * 9 * C)
    for kind, size in (
        ("fp32", 4 * (head + blocks) + vectors),
        ("int4-weight-only-head", 4 * (head + blocks) + vectors),
        ("int4-dynamic", head + 2 * blocks + scales + vectors),
        ("int4-dynamic-head", 2 * (head + blocks) + scales + vectors),
    ):
        assert weight_bytes(read_artifact(folders[kind])) == size, kind


def test_two_artifacts_of_one_kind_are_one_line(command: Command, fp32: Path, qat_fp32: Path) -> None:
    asked = ("jaxgpt-bench", "generate", "--tokens", 4, "--artifact", fp32, qat_fp32)
    assert_one_line_error(command(*asked), "are both fp32", "one after the other")


def test_a_kind_that_no_method_has_is_said_before_weights_are_made(command: Command) -> None:
    asked = ("jaxgpt-bench", "generate", "--preset", "gpt2", "--kind", "int8-dynamik")
    assert_one_line_error(command(*asked), "did you mean int8-dynamic")


def test_options_that_would_do_nothing_are_one_line(command: Command, fp32: Path) -> None:
    asked = ("jaxgpt-bench", "generate", "--artifact", fp32, "--native-only", "--uncached")
    assert_one_line_error(command(*asked), "--uncached", "--native-only")


def test_only_kinds_that_are_wanted_are_made(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    asked = ("--preset", "tiny", "--kind", "int8-dynamic", "--tokens", 2, "--rounds", 1, "--out", out)
    code, _, err = command("jaxgpt-bench", "generate", *asked)
    assert code == 0, err
    assert {row["precision"] for row in json.loads(out.read_text())["rows"]} == {"int8-dynamic"}
