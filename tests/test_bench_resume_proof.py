import json
import subprocess
from pathlib import Path

import jaxgpt_bench.training.resume_proof
import pytest
from conftest import Command, assert_one_line_error


@pytest.mark.slow  # six trainings, three of them in two processes
def test_killed_trainings_lose_nothing_in_one_process_and_in_two(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxgpt_bench.training.resume_proof, "STEPS_A_KILL", 50)
    code, out, _ = command(
        "jaxgpt-bench", "resume-proof", "--data", data, "--out", tmp_path / "proof", "--kills", 2, "--json"
    )
    figures = json.loads(out)
    assert code == 0
    assert [kill["processes"] for kill in figures["kills"]] == [1, 2]
    assert all(kill["equal"] for kill in figures["kills"])


def test_a_folder_that_exists_is_not_touched(command: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "proof").mkdir()
    (tmp_path / "proof" / "mine").touch()
    arguments = ("resume-proof", "--data", data, "--out", tmp_path / "proof")
    assert_one_line_error(command("jaxgpt-bench", *arguments), "proof")
    assert [path.name for path in (tmp_path / "proof").iterdir()] == ["mine"]


def test_trainings_that_take_too_long_are_one_line_and_end(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = jaxgpt_bench.training.resume_proof
    started: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    start = module.Training.start

    def noted(training: module.Training) -> None:
        start(training)
        started.extend(training._running)

    monkeypatch.setattr(module.Training, "start", noted)
    call = ("jaxgpt-bench", "resume-proof", "--data", data, "--out", tmp_path / "proof", "--kills", 2)
    code, _, err = command(*call)
    assert code == 2
    assert "took longer than 0 s; give fewer --kills" in err.splitlines()[-1]
    assert started
    assert all(process.poll() is not None for process in started)
