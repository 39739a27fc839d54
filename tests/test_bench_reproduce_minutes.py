"""A reproduction that fits a device and a number of minutes, cut and gone on with."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jaxgpt_bench.reproduce.build as build_module
import jaxgpt_bench.reproduce.measure as measure_module
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.reproduce import stages, training_run
from jaxgpt_bench.reproduce.minutes import fit, plan, probe, results, schedule, step_profile
from jaxgpt_bench.reproduce.minutes.clock import Clock
from jaxgpt_bench.reproduce.minutes.costs import LEAST, STAGES, Amounts, Experiment
from jaxgpt_bench.reproduce.minutes.modules import require_modules
from jaxgpt_bench.reproduce.minutes.probe import Attempt, CpuSpeed
from jaxgpt_bench.reproduce.recipes import RECIPES
from test_bench_reproduce import RECIPE, fill, speed_figures

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.console import UNFINISHED, Result
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.training.run.folder import read_metrics

CPU = CpuSpeed(forward_s=0.2, decode_s=0.01, cores=16)
ATTEMPT = Attempt(
    settings={}, why="as the preset has it", step_s=0.05, startup_s=20.0, block_size=64, tokens_per_step=256,
    state_bytes=10**7, peak_bytes=1e7, device="cpu", platform="cpu", devices=1, precision="fp32",
    attention="",
)  # fmt: skip


def length(available_s: float, step_s: float, train_tokens: int = 10**8, **other: Any) -> schedule.Length:
    given = {"batch_size": 128, "block_size": 1024, "val_tokens": 10**6, "halves": True, **other}
    return schedule.length_of(available_s, step_s, train_tokens=train_tokens, **given)


def test_the_steps_fill_the_time_and_no_more() -> None:
    found = length(900.0, 0.28)
    assert 0.99 * 900 < found.seconds <= 900
    assert found.steps * 0.28 < found.seconds  # validations and checkpoints take their share
    assert (found.batch_size, found.capped) == (128, False)
    assert found.passes == pytest.approx(found.steps * 128 * 1024 / 1e8)
    assert length(1800.0, 0.28).steps > 1.9 * found.steps


def test_a_slow_device_takes_a_smaller_batch_and_a_short_text_ends_the_training_early() -> None:
    slow = length(900.0, 6.0)
    assert (slow.batch_size, slow.tokens_per_step) == (16, 16 * 1024)
    assert slow.steps > 7 * length(900.0, 6.0, halves=False).steps
    short = length(900.0, 0.28, train_tokens=8 * 10**6)
    assert short.capped
    assert short.passes <= schedule.MAX_PASSES < short.passes + 128 * 1024 / 8e6
    assert "teaches nothing new" in str(short)
    assert "after 4 it teaches less" in str(length(900.0, 0.28, train_tokens=30 * 10**6))
    with pytest.raises(schedule.TooShortError):
        length(60.0, 100.0)


@pytest.mark.parametrize(("step_s", "steps"), [(0.28, 3000), (5.0, 150), (0.01, 50_000), (30.0, 20)])
def test_the_best_checkpoint_has_a_measured_loss_and_the_schedule_follows_the_steps(
    step_s: float, steps: int
) -> None:
    found = schedule.Length(
        steps=steps, batch_size=128, tokens_per_step=2**17, passes=1.0, capped=False, seconds=steps * step_s
    )
    recipe = {"preset": "gpt2", "max_steps": 1000}
    settings = schedule.settings_of(found, recipe, step_s / 2**17, 10**6)
    assert settings["max_steps"] == steps
    longer, shorter = sorted((settings["eval_every"], settings["checkpoint_every"]), reverse=True)
    assert longer % shorter == 0
    assert settings["checkpoint_every"] * step_s <= 1.5 * max(schedule.CHECKPOINT_S, step_s)
    assert 1 <= math.ceil(steps / settings["eval_every"]) <= schedule.MOST_VALIDATIONS
    assert settings["warmup_steps"] == round(steps * 100 / 5000)  # the preset's shares
    assert settings["momentum_warmup_steps"] == round(steps * 300 / 5000)
    TrainConfig(**settings)
    own = schedule.settings_of(found, {**recipe, "warmup_steps": 200}, step_s / 2**17, 10**6)
    assert own["warmup_steps"] == round(steps / 5)


def test_what_is_measured_is_the_most_that_fits_and_never_less_than_tells_something() -> None:
    experiment = Experiment(
        cpu=CPU, block_size=1024, train_tokens=10**8, val_tokens=10**6, methods=5, conversions=2,
        other_tokens=0,
    )  # fmt: skip
    recipe = RECIPES["gpu"]
    whole = math.fsum(experiment.seconds(Amounts.of(recipe)).values())
    assert experiment.fitting(recipe, whole) == Amounts.of(recipe)
    assert experiment.fitting(recipe, 0.0) == Amounts.of(recipe, 1 / 16)
    half = experiment.fitting(recipe, 0.7 * whole)
    assert math.fsum(experiment.seconds(half).values()) <= 0.7 * whole
    assert LEAST["quality_tokens"] < half.quality_tokens < recipe.quality_tokens
    smoke = dataclasses.replace(recipe, rounds=1, parse_samples=3)  # less than that is asked: it stays
    assert Amounts.of(smoke, 0.1).parse_samples == 3
    slower = dataclasses.replace(experiment, cpu=dataclasses.replace(CPU, forward_s=0.4, decode_s=0.02))
    before, after = experiment.seconds(half), slower.seconds(half)
    assert all(after[name] >= before[name] for name in STAGES)


def test_answers_have_their_time_where_a_recipe_asks_for_them(
    data: Path, quick: None, tmp_path: Path
) -> None:
    tokens = 2 * (20 + 20) * (5 + 1) * 250  # models, requests and docstrings, draws and greedy, of an answer
    with Clock(tmp_path, None) as clock:
        found = [
            plan.planned(asked(60.0), recipe, open_dataset(data), clock).planned_s["answers"]
            for recipe in (RECIPE, dataclasses.replace(RECIPE, answers=True))
        ]
    assert found[0] == 0
    assert 0.001 * tokens < found[1] < 2 * 0.001 * tokens  # at FakeProbe's rate, and something for the rest


def test_a_t4_and_an_h200_get_the_micro_batch_that_their_memory_holds() -> None:
    model = ModelConfig(50_257, 1024, 12, 12, 768, dropout=0.1)

    def first(precision: Any, memory: float, flash: bool, devices: int = 1) -> str:
        train = TrainConfig(precision=precision, loss_chunks=8, batch_size=128)
        for micro in fit.candidates(128, devices):
            if fit.estimated_bytes(model, train, micro, flash) < memory:
                return str(micro)
        return "none"

    assert first("fp16", 0.75 * 15.8e9, flash=False) == "4 sequences"
    assert first("bf16", 0.75 * 141e9, flash=True) == "128 sequences"
    assert first("bf16", 0.75 * 80e9, flash=True) == "64 sequences"
    assert first("bf16", 0.75 * 80e9, flash=True, devices=8) == "16 sequences"
    assert first("fp16", 6e9, flash=False) == "8 sequences, remat"
    assert first("fp16", 1e9, flash=False) == "none"
    # The measured step: 16.8 GB at 32 sequences in bf16 with cuDNN's attention, without dropout.
    train = TrainConfig(precision="bf16", loss_chunks=8)
    estimate = fit.estimated_bytes(model, train, fit.MicroBatch(32, remat=False), flash=True)
    assert estimate == pytest.approx(16.8e9, rel=0.3)


def test_every_way_to_cut_a_batch_is_a_training_that_can_be() -> None:
    for batch, devices in ((128, 1), (128, 8), (126, 3), (1, 1), (16, 4)):
        found = list(fit.candidates(batch, devices))
        for micro in found:
            settings = micro.settings(batch, devices)
            TrainConfig(**settings)
            assert batch // settings["grad_accum_steps"] == micro.sequences * devices
        assert not found[0].remat
        assert found[-1] == fit.MicroBatch(1, remat=True)
        assert [micro.remat for micro in found] == sorted(micro.remat for micro in found)


TINY = {key: value for key, value in RECIPE.train.items() if key not in ("batch_size", "grad_accum_steps")}


def test_a_trial_takes_the_first_micro_batch_that_the_compiler_fits(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def measured(config: Any, dataset: Any, mesh: Any, free: float, started: float) -> dict[str, Any]:
        micro = config.train.batch_size // config.train.grad_accum_steps
        tried.append(micro)
        if micro > 4:
            return {"needs": "9.9 GB"}
        return {"peak_bytes": 5e9, "devices": 2, "device": "T4"}

    monkeypatch.setattr(probe, "_measured", measured)
    monkeypatch.setattr("jaxgpt.training.devices.memory.free_device_bytes", lambda: 8e9)
    found = probe.attempt(data, {**TINY, "batch_size": 16}, fits_device=True)
    assert tried == [16, 8, 16, 8, 4]  # plain, then with remat
    assert found["settings"] == {"batch_size": 16, "grad_accum_steps": 4, "remat": True}
    assert found["why"] == (
        "micro-batches of 2 sequences, remat on each of 2 T4, 5.0 GB of 8.0 GB free; "
        "too large: 4 sequences, remat: 9.9 GB"
    )
    monkeypatch.setattr(probe, "_measured", lambda *_: {"needs": "9.9 GB"})
    with pytest.raises(UserError, match="no micro-batch of this training fits"):
        probe.attempt(data, {**TINY, "batch_size": 16}, fits_device=True)


def test_a_trial_times_real_steps_and_the_module_and_writes_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(data.rglob("*"))
    monkeypatch.setattr(probe, "MOST_STEPS", 3)
    found = probe.attempt(data, dict(RECIPE.train), fits_device=False)
    attempt = Attempt(**found)
    assert 0 < attempt.step_s < attempt.startup_s
    assert attempt.tokens_per_step == attempt.batch_size * attempt.block_size
    assert (attempt.platform, attempt.devices, attempt.settings) == ("cpu", 2, {})
    speed = probe.cpu_speed(data, dict(RECIPE.train))
    assert min(speed["decode_s"], speed["forward_s"]) > 0
    assert sorted(data.rglob("*")) == before


class FakeProbe(probe.Probe):
    """The process that tries a training, without the seconds that it takes."""

    def __init__(self, folder: Path) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def attempt(self, settings: dict[str, Any], fits_device: bool) -> Attempt:
        chosen = {"batch_size": 128, "grad_accum_steps": 4, "remat": False} if fits_device else {}
        tokens = 128 * 64 if fits_device else 256
        return dataclasses.replace(ATTEMPT, settings=chosen, tokens_per_step=tokens)

    def cpu_speed(self, settings: dict[str, Any]) -> CpuSpeed:
        return dataclasses.replace(CPU, forward_s=0.01, decode_s=0.001)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' recipe as preset "tests", one method, no trial, no minutes of speed."""
    monkeypatch.setitem(RECIPES, "tests", RECIPE)
    monkeypatch.setattr(build_module, "QUANTIZED", build_module.QUANTIZED[:1])
    monkeypatch.setattr(measure_module, "generate", lambda asked: Result(speed_figures()))
    monkeypatch.setattr(plan, "Probe", FakeProbe)


def asked(minutes: float, **other: Any) -> plan.Asked:
    given = {"preset": "tests", "budget_s": None, "methods": 5, "other_tokens": 0, **other}
    return plan.Asked(minutes=minutes, **given)


def test_the_plan_of_a_training_leaves_the_other_stages_their_time(
    data: Path, quick: None, tmp_path: Path
) -> None:
    dataset = open_dataset(data)
    with Clock(tmp_path, None, began=time.time() - 30) as clock:
        found = plan.planned(asked(10.0), RECIPE, dataset, clock)
        cut = plan.planned(asked(10.0, budget_s=150.0), RECIPE, dataset, clock)
        with pytest.raises(UserError, match=r"--minutes 3 are too few.*quantize.*give --minutes \d+"):
            plan.planned(asked(3.0), RECIPE, dataset, clock)
    assert found.planned_s["data and plan"] == pytest.approx(30, abs=5)
    assert set(STAGES) < set(found.planned_s)
    capped = schedule.MAX_PASSES * len(dataset.train) // 256
    assert found.train["max_steps"] == min(capped, found.train["max_steps"])
    assert cut.planned_s["train"] > found.planned_s["train"] or cut.train["max_steps"] < capped
    assert math.fsum(found.planned_s.values()) <= 600
    applied = found.applied(RECIPE)
    assert applied.train["max_steps"] == found.train["max_steps"]
    assert applied.train["preset"] == "tiny"
    found.write(tmp_path)
    assert plan.read_plan(tmp_path, "tests", 10.0) == found
    others = (
        ("tests", 11.0, "--minutes 10; now tests, --minutes 11"),
        ("cpu", 10.0, "now cpu"),
        ("tests", None, "without --minutes"),
    )
    for preset, minutes, said in others:
        with pytest.raises(UserError, match=said):
            plan.read_plan(tmp_path, preset, minutes)
    (tmp_path / plan.PLAN).write_text('{"preset": 1}')
    with pytest.raises(UserError, match="is damaged"):
        plan.read_plan(tmp_path, "tests", 10.0)


def test_a_smaller_batch_keeps_the_micro_batch_that_was_measured() -> None:
    train = dataclasses.replace(
        ATTEMPT, settings={"batch_size": 128, "grad_accum_steps": 4, "remat": True}, tokens_per_step=128 * 64
    )
    assert plan._cut(train, 128) == {"batch_size": 128, "grad_accum_steps": 4}
    assert plan._cut(train, 64) == {"batch_size": 64, "grad_accum_steps": 2}
    assert plan._cut(train, 16) == {"batch_size": 16, "grad_accum_steps": 1}
    assert plan._cut(ATTEMPT, 4) == {}


def test_what_stages_took_so_far_bounds_what_is_measured_after_them(
    data: Path, quick: None, tmp_path: Path
) -> None:
    dataset = open_dataset(data)
    large = dataclasses.replace(RECIPE, quality_tokens=2**17, parse_samples=24, parse_tokens=200, rounds=5)

    def amounts(took_s: float, spent_s: float) -> Amounts:
        folder = tmp_path / f"{took_s}"
        folder.mkdir()
        with Clock(folder, None, began=time.time() - spent_s) as clock:
            clock.note("quantize", took_s)
            chosen = plan.with_amounts(made, asked(100.0), large, dataset, clock).amounts
        assert chosen is not None
        return Amounts(**chosen)

    with Clock(tmp_path, None) as begun:
        made = plan.planned(asked(100.0), large, dataset, begun)
    assert amounts(100.0, 60.0) == Amounts.of(large)
    slow = amounts(10_000.0, 5_900.0)
    assert slow.parse_samples == LEAST["parse_samples"]
    assert slow.rounds < large.rounds


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
        training_run.trained(stages.Stages(clock=clock), "train", tmp_path / "run", settings, dataset)
        assert clock.stage_seconds()["train"] > 0
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
    assert 0 < found["spent_s"] < 600
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
