import json
import random
import shutil
from pathlib import Path
from typing import Any

import jaxgpt_bench.reproduce.build as build_module
import jaxgpt_bench.reproduce.measure as measure_module
import pytest
from conftest import Command, assert_one_line_error, write_jsonl
from jaxgpt_bench.reproduce import stages, training_run
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.recipes import RECIPES
from jaxgpt_export.native.library import library_path
from test_bench_reproduce import RECIPE, fill, speed_figures

from jaxgpt.shared.console import Result
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of, write_json
from jaxgpt.training.run.recorder import RATE_STEPS


@pytest.fixture
def filled(
    data: Path, run: Path, fp32: Path, int8_dynamic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder that the single commands filled, for the preset "tests", without the minutes of speed."""
    monkeypatch.setitem(RECIPES, "tests", RECIPE)
    monkeypatch.setattr(build_module, "QUANTIZED", build_module.QUANTIZED[:1])
    monkeypatch.setattr(measure_module, "generate", lambda asked: Result(speed_figures()))
    return fill(tmp_path / "out", data=data, run=run, fp32=fp32, int8_dynamic=int8_dynamic)


def test_texts_that_were_measured_stay_in_the_report_and_a_short_one_is_measured_too(
    command: Command, filled: Path, tmp_path: Path
) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "x = 1"}])
    call = ("jaxgpt-bench", "reproduce", "tests", "--out", filled)
    code, _, said = command(*call, "--other-text", f"{short}=one line")
    assert code == 0, said
    report = json.loads((filled / "report.json").read_text())
    (text,) = report["other_text"]
    assert 1 < text["tokens"] < 20
    assert text["documents_too_short_to_tell"] == 1
    assert {"parse_held_out", "windows"} <= set(json.loads((filled / "quality.json").read_text()))
    (yardstick, *_) = report["memorization"]["summary"]
    assert yardstick["name"] == "held-out"
    assert yardstick["texts"] == RECIPE.parse_samples
    assert 0 < yardstick["median_text_tokens"] <= RECIPE.parse_tokens
    assert report["memorization"]["overlap"]["dropped"] == report["data"]["counts"]["val_overlapping"]
    made = {entry["stage"]: entry["made"] for entry in report["stages"]}
    assert made["train"]["seconds"] > 0
    assert made["train"]["date"].startswith("20")
    assert made["train"]["commit"] is None
    assert made["quality"]["seconds"] > 0

    code, _, said = command(*call)
    assert code == 0, said
    assert "stays in the report; remove" in said
    again = json.loads((filled / "report.json").read_text())
    assert again["other_text"] == report["other_text"]
    assert all(entry["kept"] for entry in again["stages"])
    assert {entry["stage"]: entry["made"] for entry in again["stages"]} == made


def test_a_text_measured_on_other_models_is_left_out_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, path = stages.Stages(), tmp_path / "other-text-ab.json"
    log.measured(path, {"fp32": "a", "file": "ab"}, lambda: {"file": "x.jsonl", "about": ""})
    assert len(measure_module.earlier_others(log, tmp_path, {"fp32": "a"}, [])) == 1
    assert measure_module.earlier_others(log, tmp_path, {"fp32": "a"}, ["ab"]) == []
    assert measure_module.earlier_others(log, tmp_path, {"fp32": "b"}, []) == []
    assert "left out of the report; give its file with --other-text" in capfd.readouterr().err


def test_what_can_not_be_meant_is_refused_before_anything_is_made(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(*arguments: object) -> tuple[int, str, str]:
        result = command("jaxgpt-bench", "reproduce", "smoke", "--out", out, *arguments)
        assert not out.exists()
        return result

    assert_one_line_error(refused("--redo"), "--redo")
    assert_one_line_error(refused("--redo", "other-text"), "give them with --other-text")
    assert_one_line_error(refused("--redo", "answers"), "is asked nothing")
    again = ("--redo", "speed", "--budget-seconds", 300)
    assert_one_line_error(refused(*again), "--redo without --budget-seconds")
    assert_one_line_error(refused("--source", "nosuch:foo"), "'nosuch:foo'", "offline choices")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert_one_line_error(refused("--other-text", empty), "empty.jsonl is empty")
    out.mkdir()
    for name, marker in (
        ("int4-weight-only", "certificate.json"),
        ("run", "config.json"),
        ("data", "manifest"),
    ):
        (out / name).mkdir()
        (out / name / "thesis.tex").write_text("years of work")
        result = command("jaxgpt-bench", "reproduce", "smoke", "--out", out, "--source", "stdlib")
        assert_one_line_error(result, name, marker, "choose another --out")
        shutil.rmtree(out / name)
    assert list(out.iterdir()) == []


def test_a_damaged_output_is_told_with_what_helps_here(run: Path, data: Path, tmp_path: Path) -> None:
    log, dataset = stages.Stages(), open_dataset(data)
    folder, settings = tmp_path / "run", dict(RECIPE.train)
    shutil.copytree(run, folder)
    last = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=f"remove it and .*checkpoints/{last}; the same command"):
        training_run.trained(log, "train", folder, settings, dataset)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"here: remove {folder}, and the same command"):
        training_run.trained(log, "train", folder, settings, dataset)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=f"here: remove {tmp_path / 'data'}, and the same command"):
        build_module.prepared(log, tmp_path / "data", "auto", RECIPE)
    assert log.log == []


def test_the_seconds_of_a_training_are_those_between_its_steps() -> None:
    draw, rows, passed = random.Random(0), [], 0.0
    for count in (1, 30, 50, 127):  # steps between two pauses; the first of each has no time
        times = [draw.uniform(0.1, 3.0) for _ in range(count)]
        passed += sum(times)
        rows += [{"loss": 1.0}]
        for end in range(1, count + 1):
            last = times[max(end - RATE_STEPS, 0) : end]
            rows.append({"loss": 1.0, "step_ms": sum(last) / len(last) * 1e3})
        rows.append({"val_loss": 1.0})
    assert training_run.seconds_of_steps(rows) == pytest.approx(passed)
    assert training_run.seconds_of_steps([]) == 0


def test_a_measurement_names_what_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, log = tmp_path / "speed.json", stages.Stages()
    log.measured(path, {"rounds": 2, "fp32": "a" * 64, "torch": "2.1"}, dict)
    log.measured(path, {"rounds": 3, "fp32": "b" * 64, "jax": "0.10"}, dict)
    expected = f"rounds 2 -> 3, fp32 {'a' * 12}... -> {'b' * 12}..., jax none -> 0.10 and 1 more"
    assert expected in " ".join(capfd.readouterr().err.split())
    write_json(path, {"figure": 1})  # of an earlier version
    log.measured(path, {"rounds": 3}, dict)
    assert json.loads(path.read_text())["made_from"]["rounds"] == 3


def test_speed_is_kept_only_with_the_same_engine_and_packages(
    run: Path, data: Path, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "generate", lambda asked: Result(speed_figures()))
    options = ReproduceOptions("tests", tmp_path)
    built = build_module.Built(open_dataset(data), run, [fp32], None)

    def measured() -> dict[str, Any]:
        log = stages.Stages()
        made_from = measure_module.measure_speed(options, RECIPE, log, built)["made_from"]
        return {"kept": log.log[0].kept, **made_from}

    first = measured()
    assert not first["kept"]
    assert first["torch"]
    if library_path().exists():
        assert first["engine"] == sha256_of(library_path())
    assert measured()["kept"]
    other = tmp_path / "libengine.so"
    other.write_bytes(b"another build")
    monkeypatch.setenv("JAXGPT_ENGINE", str(other))
    assert not measured()["kept"]


def test_a_damaged_measurement_is_told_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.json"
    stages.Stages().measured(path, {"rounds": 5}, lambda: {"rate": 7})
    path.write_bytes(path.read_bytes()[:20])
    capsys.readouterr()
    assert stages.Stages().measured(path, {"rounds": 5}, lambda: {"rate": 8})["rate"] == 8
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in said
    assert "something else" not in said
    assert json.loads(path.read_text())["rate"] == 8
