"""`jaxgpt-bench serving`: it starts our server, asks it and another one, and says what it found."""

import json
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.serving.client import Streamed
from jaxgpt_bench.serving.rows import ServingFigures
from jaxgpt_export.native.library import instruction_sets
from serving import serving


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_servers_are_measured_side_by_side(command: Command, int8_dynamic: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    few = ("--clients", 1, 3, "--temperature", 0, "--tokens", 10, "--rounds", 2, "--long-prompt", 0)
    with serving("--artifact", int8_dynamic) as other:
        arguments = ("--artifact", int8_dynamic, "--url", f"other={other.address}", "--out", out)
        code, _, err = command("jaxgpt-bench", "serving", *arguments, *few)
    assert code == 0, err
    figures = ServingFigures.from_json(json.loads(out.read_text()))
    assert [(row.server, row.clients) for row in figures.load] == [
        ("jaxgpt", 1),
        ("other", 1),
        ("jaxgpt", 3),
        ("other", 3),
    ]
    assert all(row.tokens_per_s.min > 0 and row.first_token_ms.min > 0 for row in figures.load)
    assert figures.alone_tokens_per_s is not None
    assert "tokens/s" in err


def test_times_between_tokens_are_shared_by_those_that_come_at_once() -> None:
    streamed = Streamed(1.0, [(1.5, 1), (1.7, 2), (1.8, 1)])
    assert streamed.first_s == 0.5
    assert streamed.gaps == pytest.approx([0.1, 0.1, 0.1])


def test_bad_options_are_one_line(command: Command, int8_dynamic: Path) -> None:
    assert_one_line_error(command("jaxgpt-bench", "serving"), "no server")
    assert_one_line_error(command("jaxgpt-bench", "serving", "--url", "x"), "NAME=http://")
    assert_one_line_error(
        command("jaxgpt-bench", "serving", "--artifact", int8_dynamic, "--tokens", 0), "--tokens"
    )
