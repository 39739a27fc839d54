"""A reproduction that fits a device and a number of minutes: what is trained and measured in them."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest
from jaxgpt_bench.reproduce.minutes import fit, plan, probe, schedule
from jaxgpt_bench.reproduce.minutes.clock import Clock
from jaxgpt_bench.reproduce.minutes.costs import LEAST, STAGES, Amounts, Experiment
from jaxgpt_bench.reproduce.minutes.probe import Attempt
from jaxgpt_bench.reproduce.recipes import RECIPES
from reproduce_minutes import ATTEMPT, CPU, asked, quick_trials
from test_bench_reproduce import RECIPE

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError


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


@pytest.mark.parametrize(
    ("batch", "devices", "micro_batch", "expected"),
    [
        (126, 6, 126, 126),  # 63 do not divide over 6
        (96, 6, 96, 24),
        (126, 3, 6, 126),  # 63 are no whole micro-batches of 6
        (96, 3, 6, 24),
        (128, 4, 64, 16),
    ],
)
def test_half_a_batch_divides_over_devices_and_into_micro_batches(
    batch: int, devices: int, micro_batch: int, expected: int
) -> None:
    found = length(900.0, 6.0, batch_size=batch, devices=devices, micro_batch=micro_batch)
    assert found.batch_size == expected
    accumulate = max(found.batch_size // micro_batch, 1)
    assert found.batch_size % accumulate == 0
    assert found.batch_size // accumulate % devices == 0


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_trials(monkeypatch)


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
