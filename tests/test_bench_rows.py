"""Rows go through JSON and back, those of the committed files too, whatever version wrote them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jaxgpt_bench.common import provenance as provenance_module
from jaxgpt_bench.common.json_data import JsonData
from jaxgpt_bench.common.provenance import ROOT, commit, provenance
from jaxgpt_bench.common.rows import (
    Machine,
    Provenance,
    QualityFigures,
    QualityRow,
    SpeedFigures,
    SpeedRow,
    Spread,
)
from jaxgpt_bench.common.step_rows import StepFigures

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
ADDED_LATER = {"isa": ""}  # keys of today's rows that the oldest files lack


def committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def assert_round_trip(kind: type[JsonData], found: dict[str, Any]) -> None:
    """Every key keeps its value; a key that is added has its default."""
    written = json.loads(json.dumps(kind.from_json(found).to_json()))
    for row, again in zip(found.get("rows", [found]), written.get("rows", [written]), strict=True):
        added = {key: again[key] for key in again.keys() - row.keys()}
        assert added.items() <= ADDED_LATER.items()
        assert {key: again[key] for key in again if key not in added} == row
    kept = {key: value for key, value in written.items() if key in found or key not in ADDED_LATER}
    assert {**kept, "rows": None} == {**found, "rows": None}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("generate_*.json")), ids=lambda path: path.name)
def test_committed_speed_figures_round_trip(path: Path) -> None:
    assert_round_trip(SpeedFigures, committed(path.name))


@pytest.mark.parametrize("name", ["train_tiny_2048.json", "train_tiny_50257.json"])
def test_committed_training_figures_round_trip(name: str) -> None:
    assert_round_trip(StepFigures, committed(name))


@pytest.mark.parametrize("name", ["reference_int4_head.json", "reference_int4_nearest.json"])
def test_committed_quality_figures_round_trip(name: str) -> None:
    assert_round_trip(QualityFigures, committed(name))


def test_rows_inside_committed_reports_round_trip() -> None:
    for row in committed("reference_quality.json")["rows"]:
        assert_round_trip(QualityRow, row)
    speeds = [*committed("demo.json")["speed"], committed("reproduce_reference.json")["speed"]]
    for row in (row for speed in speeds for row in speed["rows"]):
        assert_round_trip(SpeedRow, row)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_the_provenance_of_every_committed_file_is_read(path: Path) -> None:
    found = committed(path.name)
    assert Provenance.from_json(found).to_json() == {
        "command": "", **{key: found[key] for key in ("machine", "date", "commit")},
        **{key: found[key] for key in ("command", "noise") if key in found},
    }  # fmt: skip


def test_what_an_older_file_lacks_has_a_default_and_what_no_field_has_is_passed_over() -> None:
    row = committed("reference_quality.json")["rows"][0]
    older = {key: value for key, value in row.items() if key not in ("difference_error", "parse_cut")}
    found = QualityRow.from_json({**older, "of_a_later_version": 1})
    assert (found.difference_error, found.parse_cut, found.parent) == (None, 0, None)


def test_a_row_that_lacks_a_figure_or_has_another_kind_is_named() -> None:
    row = committed("generate_gpt2.json")["rows"][0]
    with pytest.raises(KeyError, match="SpeedRow lacks seconds"):
        SpeedRow.from_json({key: value for key, value in row.items() if key != "seconds"})
    with pytest.raises(TypeError, match="seconds is float, expected an object"):
        SpeedRow.from_json({**row, "seconds": 1.0})
    with pytest.raises(TypeError, match="greedy_tokens is str, expected a list"):
        SpeedRow.from_json({**row, "greedy_tokens": "abc"})


def test_a_spread_is_median_least_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 7.0, 2.0]).to_json() == {"median": 2.5, "min": 1.0, "max": 7.0}


def test_the_commit_is_that_of_the_source_tree(tmp_path: Path) -> None:
    assert (ROOT / "bench" / "jaxgpt_bench" / "common" / "provenance.py").is_file()
    assert (ROOT / "pyproject.toml").is_file()
    inside = tmp_path / "site-packages"
    inside.mkdir()
    (inside / "file.txt").write_text("1")
    assert commit(inside) == "unknown"
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert commit(tmp_path) == head[:12]
    (tmp_path / "bench" / "peers").mkdir(parents=True)
    (tmp_path / "bench" / "figures.json").touch()
    assert commit(tmp_path) == head[:12]
    (tmp_path / "bench" / "peers" / "mine.py").touch()  # a program that is found by its file
    assert commit(tmp_path) == f"{head[:12]}-dirty"
    (tmp_path / "bench" / "peers" / "mine.py").unlink()
    assert commit(inside) == "unknown"  # installed inside another project's checkout
    (inside / "file.txt").write_text("2")
    assert commit(tmp_path) == f"{head[:12]}-dirty"


def test_provenance_describes_this_machine() -> None:
    found = provenance()
    assert isinstance(found.machine, Machine)
    assert found.machine.cores >= 1
    assert found.machine.memory_gb > 0
    assert found.command.startswith("jaxgpt-bench")
    assert found.date.endswith("+00:00")


def test_a_tree_that_changes_under_a_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance_module, "_BEGUN", "0123456789ab")
    assert provenance().commit == "0123456789ab"
    monkeypatch.setattr(provenance_module, "_CODE_BEGUN", "another")
    assert provenance().commit == "0123456789ab-changed"


def test_figures_that_a_command_writes_do_not_change_its_code(tmp_path: Path) -> None:
    (tmp_path / "jaxgpt").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    code, figures = tmp_path / "jaxgpt" / "a.py", tmp_path / "bench" / "results" / "a.json"
    code.write_text("1")
    figures.write_text("1")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], check=True)
    before = provenance_module._code(tmp_path)
    figures.write_text("2")
    assert provenance_module._code(tmp_path) == before
    code.write_text("2")
    assert provenance_module._code(tmp_path) != before
