import json
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
