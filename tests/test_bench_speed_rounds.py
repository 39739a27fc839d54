"""Rounds of `jaxgpt-bench generate` that do not come to their end, and line-ups that can't be measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.speed.contestants import Contestant
from jaxgpt_bench.speed.options import SpeedOptions
from jaxgpt_bench.speed.programs import NATIVE
from jaxgpt_bench.speed.rounds import Rounds

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
    monkeypatch.setattr(Contestant, "start", lambda self, prompt, count: (workers[self.name], {}))
    monkeypatch.setattr("jaxgpt_bench.speed.rounds.read_bandwidth", lambda size, threads: 10.0)
    return Rounds(line_up, [1, 2], [1, 2, 3], SpeedOptions(tokens=4, rounds=3), 1), workers


def test_a_peer_that_stops_in_a_round_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, workers = rounds_of(monkeypatch, ours=100, peer=1 + 3 + 1)  # the second round's warm-up
    assert len(list(rounds.run())) == 3
    ours, peer = rounds.answers
    assert len(rounds.answers[ours]) == 3
    assert rounds.failed == {peer: f"{peer} stopped with code -9"}
    assert all(worker.closed for worker in workers.values())


def test_this_project_s_own_program_that_stops_ends_the_rounds_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, workers = rounds_of(monkeypatch, ours=1 + 3)
    running = rounds.run()
    next(running)
    with pytest.raises(UserError, match="stopped with code -9; --out has the rounds before it"):
        next(running)
    assert all(worker.closed for worker in workers.values())


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
