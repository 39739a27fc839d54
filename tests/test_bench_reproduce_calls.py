"""A reproduction in minutes, in several calls: cut, gone on with, and what it leaves."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.reproduce import stages, training_run
from jaxgpt_bench.reproduce.minutes import plan, results, step_profile
from jaxgpt_bench.reproduce.minutes.clock import Clock
from jaxgpt_bench.reproduce.minutes.modules import require_modules
from jaxgpt_bench.reproduce.recipes import RECIPES
from reproduce_minutes import asked, quick_trials
from test_bench_reproduce import RECIPE, fill

from jaxgpt.shared.console import UNFINISHED
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.training.run.folder import read_metrics


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_trials(monkeypatch)


def test_the_calls_of_an_experiment_add_up_and_a_killed_one_ends_with_its_last_file(tmp_path: Path) -> None:
    now = time.time()
    with Clock(tmp_path, None, began=now - 100) as clock:
        clock.note("data", 40.0)
        assert clock.spent_s() == pytest.approx(100, abs=2)
        assert clock.left_s() == math.inf
    killed = Clock(tmp_path, 500.0, began=now - 50)  # never ends
    killed.note("train", 7.0)
    (tmp_path / "metrics.jsonl").write_text("{}")
    for path in tmp_path.iterdir():
        os.utime(path, (now - 30, now - 30))
    with Clock(tmp_path, 60.0, began=now - 10) as last:
        assert last.spent_s() == pytest.approx(100 + 20 + 10, abs=2)
        assert last.left_s() == pytest.approx(50, abs=2)
        last.note("train", 5.0)
        assert last.stage_seconds() == {"data": 40.0, "train": 12.0}
    (tmp_path / "calls.json").write_text('{"calls": [{"began": "yesterday"}]}')
    with pytest.raises(UserError, match=r"calls.json is damaged.*remove it"):
        Clock(tmp_path, None)


def test_a_call_begins_what_it_has_time_for_and_its_first_stage_in_any_case(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def begun(budget_s: float, *names: str, until: str | None = None) -> list[str]:
        done = []
        with Clock(tmp_path, budget_s, began=time.time()) as clock:
            log = stages.Stages(clock=clock, until=until, needs_s=lambda stage: 100.0)
            try:
                for name in names:
                    with log.doing(name, "trying"):
                        done.append(name)
            except stages.StoppedError as stop:
                code = UNFINISHED if stop.result.unfinished else 0
                return [*done, f"stopped before {stop.result.figures['stage']} with {code}"]
        return done

    assert begun(500.0, "train", "quality") == ["train", "quality"]
    assert begun(90.0, "quality", "speed") == ["quality", "stopped before speed with 75"]
    assert "a larger budget is safer" in capfd.readouterr().err
    assert begun(5.0, "quality") == ["stopped before quality with 75"]
    assert begun(500.0, "train", "qat", until="train") == ["train", "stopped before qat with 0"]
    assert begun(500.0, "other-text-ab12", until="samples") == ["stopped before other-text with 0"]


def test_a_training_that_a_call_cuts_goes_on_to_the_same_losses(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxgpt_bench.reproduce.minutes.clock.REPEATED_S", 0.05)
    settings, dataset = dict(RECIPE.train), open_dataset(data)
    with Clock(tmp_path, 60.0, began=time.time() - 45) as clock:
        log = stages.Stages(clock=clock)
        with pytest.raises(stages.StoppedError) as stop:
            training_run.trained(log, "train", tmp_path / "run", settings, dataset, saving_s=60.0)
    assert stop.value.result.unfinished
    done = stop.value.result.figures["steps"]
    assert 1 <= done < settings["max_steps"]
    with Clock(tmp_path, None, began=time.time()) as clock:
        log = stages.Stages(clock=clock)
        training_run.trained(log, "train", tmp_path / "run", settings, dataset)
        assert clock.stage_seconds()["train"] > 0
    assert log.log[0].made.seconds == training_run.made_of_run(tmp_path / "run")["seconds"]
    undisturbed, cut = (
        {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}
        for folder in (run, tmp_path / "run")
    )
    assert cut == undisturbed


def test_an_experiment_in_minutes_ends_with_small_files_of_all_that_matters(
    command: Command, data: Path, run: Path, fp32: Path, int8_dynamic: Path, quick: None, tmp_path: Path
) -> None:
    out = fill(tmp_path / "out", data=data, run=run, fp32=fp32, int8_dynamic=int8_dynamic)
    call = ("jaxgpt-bench", "reproduce", "tests", "--out", out, "--minutes", 30)
    assert_one_line_error(command(*call), "was begun without a plan")
    with Clock(tmp_path, None) as clock:
        made = plan.planned(asked(30.0), RECIPE, open_dataset(data), clock)
    dataclasses.replace(made, train={}).write(out)  # that of the run which is there

    code, _, said = command(*call, "--stage", "quantize")
    assert code == 0
    assert "stopped in quality: --stage quantize is done; left: quality, samples, " in said
    assert f"to go on: jaxgpt-bench reproduce tests --out {out} --minutes 30" in said
    assert sorted(path.name for path in (out / "results").iterdir()) == ["measured.json", "run.json"]
    assert not (out / "quality.json").exists()

    code, _, said = command(*call, "--budget-seconds", 3600)
    assert code == 0, said
    names = sorted(path.name for path in (out / "results").iterdir())
    assert names == ["measured.json", "report.html", "report.json", "run.json"]
    found = json.loads((out / "results" / "run.json").read_text())
    assert found["plan"]["amounts"]["quality_tokens"] == RECIPE.quality_tokens
    assert found["trainings"]["run"]["summary"]["steps"] == RECIPE.train["max_steps"]
    assert found["trainings"]["run"]["metrics"]["step"][-1] == RECIPE.train["max_steps"]
    assert found["took_s"]["quality"] > 0
    calls = json.loads((out / "calls.json").read_text())["calls"]
    all_calls_s = sum(call["ended"] - call["began"] for call in calls)
    assert found["took_s"]["quality"] < found["spent_s"] < all_calls_s + 0.1  # it is rounded
    measured = json.loads((out / "results" / "measured.json").read_text())
    assert set(measured) == {"quality", "samples", "memorization", "speed", "other_text"}
    report = json.loads((out / "results" / "report.json").read_text())
    assert report["command"].endswith("--minutes 30")
    assert sum(path.stat().st_size for path in (out / "results").iterdir()) < 2_000_000
    before = (out / "quality.json").read_bytes()
    assert command(*call)[0] == 0
    assert (out / "quality.json").read_bytes() == before


def test_answers_are_among_what_is_sent(tmp_path: Path) -> None:
    (tmp_path / "answers.md").write_text("Read this first")
    (tmp_path / "answers.json").write_text('{"answers": [{"kind": "fp32"}]}')
    with Clock(tmp_path, None) as clock:
        results.write_results(tmp_path, clock)
    assert (tmp_path / "results" / "answers.md").read_text() == "Read this first"
    measured = json.loads((tmp_path / "results" / "measured.json").read_text())
    assert measured["answers"] == {"answers": [{"kind": "fp32"}]}


def test_what_is_too_large_to_be_sent_is_left_out_and_metrics_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5001)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 5001, "lo')  # a killed process
    (tmp_path / "report.html").write_text("x" * 300_000)
    monkeypatch.setattr(results, "MOST_BYTES", 200_000)
    with Clock(tmp_path, None) as clock:
        results.write_results(tmp_path, clock)
    kept = json.loads((tmp_path / "results" / "run.json").read_text())["trainings"]["run"]
    assert kept["steps"] == 5000
    assert len(kept["metrics"]["step"]) == results.MOST_ROWS
    assert (kept["metrics"]["step"][0], kept["metrics"]["step"][-1]) == (1, 5000)
    assert not (tmp_path / "results" / "report.html").exists()
    assert "report.html has 0.3 MB and is left out" in capfd.readouterr().err


def test_time_that_can_not_be_meant_is_refused_before_anything_is_made(
    command: Command, run: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> tuple[int, str, str]:
        result = command("jaxgpt-bench", "reproduce", "smoke", "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
        return result

    for minutes in (0, -5, 2.9, "nan", "inf"):
        assert_one_line_error(refused("--minutes", minutes), f"--minutes ({minutes})", "between 3 and")
    assert_one_line_error(refused("--minutes", "ten"), "--minutes ten")
    assert_one_line_error(refused("--budget-seconds", 59), "--budget-seconds (59)")
    assert_one_line_error(refused("--minutes", 10, "--max-steps", 5), "leave --run and --max-steps out")
    assert_one_line_error(refused("--minutes", 10, "--run", run), "leave --run and --max-steps out")
    assert_one_line_error(refused("--stage", "trian"), "--stage", "train")


def test_a_module_that_is_missing_is_named_with_its_wheel_before_any_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxgpt_bench.reproduce.command.MODULES", ("json", "no_such_module", "orbax"))
    result = command("jaxgpt-bench", "reproduce", "smoke", "--out", tmp_path / "out")
    assert_one_line_error(
        result, "not installed here: no_such_module;", "pip install --no-index --find-links"
    )
    assert not (tmp_path / "out").exists()
    require_modules(("json", "orbax"))


def test_a_profile_that_fails_is_told_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fits = {"settings": {"grad_accum_steps": 2}, "tokens_per_step": 2**17, "block_size": 1024, "devices": 2}
    words = step_profile.profile_command(RECIPES["gpu"], {**fits, "precision": "bf16"})
    assert words[:2] == ["train", "gpt2"]
    assert {"--batch-size=32", "--precision=bf16", "--dropout=0.1", "--alone", "--profile"} <= set(words)
    monkeypatch.setattr(step_profile.sys, "executable", "/bin/false")
    assert step_profile.step_profile(words) == {"failed": "it left with code 1"}
    assert "[profile] left out" in capfd.readouterr().err
