import json
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error


@pytest.mark.parametrize("program", ["jaxgpt", "jaxgpt-export", "jaxgpt-bench"])
def test_unknown_command_is_one_line_with_the_nearest(command: Command, program: str) -> None:
    nearest = {"jaxgpt": "prepare", "jaxgpt-export": "convert", "jaxgpt-bench": "quality"}[program]
    assert_one_line_error(command(program, nearest[:-1]), nearest, "did you mean")


def test_unknown_option_is_one_line_with_the_nearest(command: Command, tmp_path: Path) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", tmp_path, "--out", tmp_path, "--max-step", 3)
    assert_one_line_error(result, "--max-step", "did you mean --max-steps")


def test_missing_option_is_one_line(command: Command) -> None:
    assert_one_line_error(command("jaxgpt", "prepare", "--source", "stdlib"), "--out")


def test_value_of_the_wrong_type_is_one_line(command: Command, tmp_path: Path) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", tmp_path, "--out", tmp_path, "--max-steps", "many")
    assert_one_line_error(result, "--max-steps", "many")


def test_unknown_method_is_one_line_with_the_choices(command: Command, tmp_path: Path) -> None:
    arguments = ("--artifact", tmp_path, "--method", "dinamic", "--out", tmp_path / "new")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "dinamic", "dynamic")


def test_json_prints_exactly_one_document_on_stdout(command: Command, run: Path) -> None:
    code, out, err = command("jaxgpt", "evaluate", "--run", run, "--json")
    assert code == 0
    assert out.count("\n") == 1
    figures = json.loads(out)
    assert f"{figures['val_loss']:.4f}" in err


def test_no_json_means_nothing_on_stdout(command: Command, run: Path) -> None:
    code, out, _ = command("jaxgpt", "evaluate", "--run", run)
    assert code == 0
    assert out == ""


def test_help_goes_out_with_code_0_and_no_command_with_code_2(command: Command) -> None:
    assert command("jaxgpt", "--help")[0] == 0
    assert command("jaxgpt")[0] == 2
