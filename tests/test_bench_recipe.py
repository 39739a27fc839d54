"""`jaxgpt-bench recipe`: what its columns rest on, and that it goes on from what its file holds."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jaxgpt_bench.recipe.command
import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.recipe.command import RecipeFigures
from jaxgpt_bench.recipe.cost import muon_cost, newton_schulz_flops
from jaxgpt_bench.recipe.figures import RecipeRow, recipe_rows, steps_to
from jaxgpt_bench.recipe.page import markdown_block
from jaxgpt_bench.recipe.rows import ROWS, SHAPES, TRIALS, runs_of, trial_runs
from jaxgpt_bench.recipe.runs import Outcome, Run
from jaxgpt_bench.recipe.training_process import train

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.presets import PRESETS
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.step.compiled import CompiledTraining

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
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
    assert change.val_loss is not None
    assert change.val_loss.error == pytest.approx(0.05)
    # It has after 200 steps what Muon has after 283, so it takes 0.71 of Muon's 200.
    assert change.steps_to_target is not None
    assert change.steps_to_target.mean == pytest.approx(200 / 2**0.5, rel=0.02)
    assert change.cpu_seconds_to_target == pytest.approx(0.1 * change.steps_to_target.mean)
    assert not change.extrapolated


def test_a_seed_that_diverged_is_told_and_its_row_is_held_against_no_other() -> None:
    losses = {"adamw": {400: 4.0}, "muon": {200: 4.0, 400: 3.5}, "change": {200: 3.75}, "wild": {}}
    outcomes = [
        outcome(row, steps, seed, loss)
        for row, curve in losses.items()
        for seed in (0, 1)
        for steps, loss in curve.items()
    ]
    outcomes += [
        outcome("change", 200, 2, None),
        outcome("wild", 200, 0, None),
        outcome("wild", 200, 1, None),
    ]
    adamw, muon, change, wild = recipe_rows(outcomes)
    assert (adamw.diverged, muon.diverged) == (None, None)
    assert (change.diverged, change.seeds, change.val_loss and change.val_loss.mean) == (1, 3, 3.75)
    assert (change.against_muon, change.steps_to_target, change.share_of_adamw) == (None, None, None)
    assert (wild.diverged, wild.seeds, wild.val_loss, wild.steps) == (2, 2, None, 200)
    block = markdown_block((muon, change, wild))
    assert "| Muon | 2 | 3.5000 ± 0.0000 at 400 |" in block
    assert "| change | 3 | 3.7500 ± 0.0000, diverged (1 of 3 seeds) at 200 |  |" in block
    assert "| wild | 2 | diverged (2 of 2 seeds) at 200 |  |" in block
    assert RecipeRow.from_json(json.loads(json.dumps(wild.to_json()))) == wild


def test_what_a_row_gave_before_it_was_changed_is_not_mixed_with_what_it_gives_now() -> None:
    (now,) = runs_of("betas", "1m", 0)
    before = dataclasses.replace(now, settings={**now.settings, "beta1": 0.7})
    said = dataclasses.replace(now, settings={**now.settings, "batch_size": TrainConfig().batch_size})
    retired = dataclasses.replace(before, row="zero-projections")
    trial = dataclasses.replace(before, row="muon-trials")
    outcomes = tuple(
        dataclasses.replace(outcome("", run.steps, 0, 1.0), run=run)
        for run in (now, before, said, retired, trial)
    )
    found = [each.run for each in jaxgpt_bench.recipe.command._of_table(outcomes)]
    assert found == [now, said, retired]


@pytest.mark.parametrize("name", ["recipe.json", "recipe_6m.json"])
def test_a_committed_table_is_that_of_its_outcomes(name: str) -> None:
    figures = RecipeFigures.from_json(json.loads((RESULTS / name).read_text()))
    made = recipe_rows(jaxgpt_bench.recipe.command._of_table(figures.outcomes))
    assert markdown_block(made) == markdown_block(figures.rows)


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
