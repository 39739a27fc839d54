"""`jaxgpt-bench recipe`: what its columns rest on, and that it goes on from what its file holds."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jaxgpt_bench.recipe.command
import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.recipe.cost import muon_cost, newton_schulz_flops
from jaxgpt_bench.recipe.figures import recipe_rows, steps_to
from jaxgpt_bench.recipe.rows import ROWS, SHAPES, TRIALS, runs_of, trial_runs
from jaxgpt_bench.recipe.runs import Outcome, Run
from jaxgpt_bench.recipe.training_process import train

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.presets import PRESETS
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.step.compiled import CompiledTraining

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2}
# Norms, scaling and decay of one update: a few operations an element, of 5 * 6 * 64 and more in the products.
ELEMENTWISE_SHARE = 0.02


def outcome(row: str, steps: int, seed: int, loss: float | None) -> Outcome:
    run = Run(row=row, shape="1m", steps=steps, seed=seed, settings={})
    return Outcome(run=run, val_loss=loss, val_bits_per_byte=loss, cpu_seconds=steps * 0.1)


def test_steps_to_a_loss_are_interpolated_in_the_logarithm_of_the_steps() -> None:
    curve = {100: 5.0, 200: 4.0, 400: 3.5}
    assert steps_to(curve, 4.0) == pytest.approx(200)
    assert steps_to(curve, 4.5) == pytest.approx(100 * 2**0.5)
    assert steps_to(curve, 3.75) == pytest.approx(200 * 2**0.5)
    assert steps_to(curve, 6.0) == pytest.approx(50)
    assert steps_to(curve, 3.0) == pytest.approx(800)
    assert steps_to({**curve, 300: 4.2}, 3.75) == pytest.approx(200 * 2**0.5)  # worse than a shorter one
    assert np.isnan(steps_to({100: 5.0}, 4.0))


def test_rows_compare_equal_seeds_and_lengths_and_say_the_share_of_adamw() -> None:
    losses = {"adamw": {200: 4.5, 400: 4.0}, "muon": {100: 4.5, 200: 4.0, 400: 3.5}, "change": {200: 3.75}}
    outcomes = [
        outcome(row, steps, seed, loss + 0.1 * seed)
        for row, curve in losses.items()
        for seed in (0, 1)
        for steps, loss in curve.items()
    ]
    adamw, muon, change = recipe_rows([*outcomes, outcome("change", 400, 0, None)])
    assert (adamw.steps, muon.steps, change.steps) == (400, 400, 200)
    assert adamw.share_of_adamw == 1.0
    assert muon.share_of_adamw == pytest.approx(0.5, rel=0.01)
    assert change.against_muon is not None
    assert change.against_muon.mean == pytest.approx(-0.25)
    assert change.against_muon.error == pytest.approx(0.0)  # the seeds differ, the differences don't
    assert change.val_loss.error == pytest.approx(0.05)
    # It has after 200 steps what Muon has after 283, so it takes 0.71 of Muon's 200.
    assert change.steps_to_target is not None
    assert change.steps_to_target.mean == pytest.approx(200 / 2**0.5, rel=0.02)
    assert change.cpu_seconds_to_target == pytest.approx(0.1 * change.steps_to_target.mean)
    assert not change.extrapolated


def test_every_row_and_trial_is_a_training_that_can_be_configured() -> None:
    for shape, rows in ROWS.items():
        runs = [run for name in rows for run in runs_of(name, shape, 1)]
        runs += [run for name in TRIALS for run in trial_runs(name, shape)]
        for run in runs:
            TrainConfig(max_steps=run.steps, batch_size=SHAPES[shape]["batch_size"], **run.settings)


def test_the_cost_of_muon_is_what_the_compiler_counts() -> None:
    model = ModelConfig(vocab_size=32, block_size=8, n_layer=1, n_head=1, n_embd=64)

    def flops(optimizer: str) -> float:
        config = TrainConfig(batch_size=1, optimizer=optimizer, split_qkv=True)
        lowered = CompiledTraining(model, config, make_mesh("", 1), FLOAT32).lower_step()
        return float(lowered.cost_analysis()["flops"])

    counted = flops("muon") - flops("adamw")
    assert counted == pytest.approx(newton_schulz_flops(model, split_qkv=True), rel=ELEMENTWISE_SHARE)


def test_a_step_of_gpt2_with_muon_costs_at_most_a_twentieth_more() -> None:
    """Even where a step has only 64 sequences."""
    assert 1.0 < muon_cost(PRESETS["gpt2"].model(50_257), 64 * 1024, split_qkv=True) < 1.05


def test_a_training_process_trains_and_measures(data: Path) -> None:
    run = Run(row="x", shape="1m", steps=3, seed=0, settings={"warmup_steps": 1})
    dataset = open_dataset(data)
    last = train(run, TINY, dataset)
    averaged = train(dataclasses.replace(run, average_last=1.0), TINY, dataset)
    assert last.val_loss is not None
    assert averaged.val_loss is not None
    uniform = np.log(dataset.vocab_size)
    assert uniform - 0.5 < last.val_loss < averaged.val_loss < uniform + 0.1  # the average lags behind


def test_it_goes_on_from_its_file_and_refuses_another_data_sets(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Run] = []

    def take(
        runs: Iterable[Run], shape: Mapping[str, int], data: Path, jobs: int, keep: Callable[[Outcome], None]
    ) -> None:
        for run in runs:
            taken.append(run)
            figure = outcome(run.row, run.steps, run.seed, 5 - run.steps / 1000)
            keep(dataclasses.replace(figure, run=run))

    monkeypatch.setattr(jaxgpt_bench.recipe.command, "take", take)
    given = ("recipe", "--data", data, "--out", tmp_path / "recipe.json", "--json")
    rows = ("--rows", "adamw", "muon", "--seeds", 0, 1)
    code, _, _ = command("jaxgpt-bench", *given, *rows, "--lengths", 100)
    assert code == 0
    assert [(run.row, run.seed) for run in taken] == [("adamw", 0), ("muon", 0), ("adamw", 1), ("muon", 1)]
    code, out, err = command("jaxgpt-bench", *given, *rows, "--lengths", 100, 200)
    assert code == 0
    assert [run.steps for run in taken[4:]] == [200] * 4
    figures = json.loads(out)
    assert figures == json.loads((tmp_path / "recipe.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["adamw", "muon"]
    assert "muon" in err
    figures["data"]["sha256"] = "other"
    (tmp_path / "recipe.json").write_text(json.dumps(figures))
    assert_one_line_error(command("jaxgpt-bench", *given), "another data set", "--out")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--rows", "muno"), ("'muno'", "muon")),
        (("--jobs", 0), ("--jobs",)),
        (("--lengths", 0), ("--lengths",)),
    ],
)
def test_bad_options_are_refused(
    command: Command, data: Path, tmp_path: Path, arguments: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    given = ("recipe", "--data", data, "--out", tmp_path / "recipe.json")
    assert_one_line_error(command("jaxgpt-bench", *given, *arguments), *parts)
    assert not (tmp_path / "recipe.json").exists()
