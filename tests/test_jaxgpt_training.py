"""What a script gets: the names of jaxgpt, Training, RunFolder."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import python

import jaxgpt
from jaxgpt.shared.dataset import pack_mask
from jaxgpt.shared.errors import UserError
from jaxgpt.training.run.folder import read_metrics, read_run_config
from jaxgpt.training.run.run_folder import RunFolder
from jaxgpt.training.run.training import Training

ROOT = Path(__file__).resolve().parent.parent


def training_of(run: Path, data: Path, **changed: Any) -> Training:
    """The training of a run, with other settings."""
    config = read_run_config(run)
    train = dataclasses.replace(config.train, **changed)
    mesh = jaxgpt.make_mesh("", 2)
    return Training(config.model, train, jaxgpt.open_dataset(data), mesh, preset=config.preset)


def recorded(run: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")
    return [(row["step"], name, row[name]) for row in read_metrics(run) for name in names if name in row]


def checksum_of(run: Path, step: int) -> int:
    text = (run / "checkpoints" / str(step) / "position" / "metadata").read_text()
    return int(json.loads(text)["checksum"])


def steps_until(run: RunFolder, last: int) -> None:
    """Train as a script does, to a step; validate and save every 20 steps."""
    state, training = run.begin_or_resume(), run.training
    for step in range(int(state.step) + 1, last + 1):
        state, metrics = training.step(state, training.batch(step))
        run.record(step, metrics)
        if step % 20 == 0:
            run.save(state, run.validate(state))


def test_a_loop_of_one_s_own_leaves_what_the_command_leaves(run: Path, data: Path, tmp_path: Path) -> None:
    """Interrupted after step 30 it resumes at 20; losses, configuration and checkpoints are the same bits."""
    own = tmp_path / "own"
    with RunFolder(own, training_of(run, data)) as folder:
        steps_until(folder, 30)
    with RunFolder(own, training_of(run, data)) as folder:
        assert int(folder.begin_or_resume().step) == 20
    with RunFolder(own, training_of(run, data)) as folder:
        steps_until(folder, 40)
        assert folder.best_val_loss() == min(
            row["val_loss"] for row in read_metrics(run) if "val_loss" in row
        )
    assert recorded(own) == recorded(run)
    assert (own / "config.json").read_bytes() == (run / "config.json").read_bytes()
    assert [checksum_of(own, step) for step in (20, 40)] == [checksum_of(run, step) for step in (20, 40)]


def test_of_prompts_so_much_is_learned_as_is_told(run: Path, data: Path) -> None:
    """A data set that does not tell them from answers is refused, and what helps is named."""
    with pytest.raises(UserError, match=r"prompt_loss_weight is 0\.1, and .* prepare it with --answers-only"):
        training_of(run, data, prompt_loss_weight=0.1)
    config, mesh, whole = read_run_config(run), jaxgpt.make_mesh("", 2), jaxgpt.open_dataset(data)
    counts = np.random.default_rng(0).integers(2, size=len(whole.train)).astype(bool)
    masked = dataclasses.replace(whole, train_mask=pack_mask(counts))
    learned = []
    for weight in (0.0, 0.5, 1.0):
        train = dataclasses.replace(config.train, prompt_loss_weight=weight)
        training = Training(config.model, train, masked, mesh)
        learned.append(sum(int((np.asarray(training.batch(step)[1]) >= 0).sum()) for step in range(1, 9)))
    none, half, every = learned
    assert every == 8 * config.train.batch_size * config.model.block_size
    assert none < half < every
    assert half == pytest.approx((none + every) / 2, rel=0.05)


def test_the_last_steps_are_written_down_though_nothing_was_saved(
    run: Path, data: Path, tmp_path: Path
) -> None:
    with RunFolder(tmp_path / "own", training_of(run, data)) as folder:
        steps_until(folder, 3)
    assert [row["step"] for row in read_metrics(tmp_path / "own")] == [1, 2, 3]


def test_a_caller_s_own_figures_are_written_down(run: Path, data: Path, tmp_path: Path) -> None:
    training = training_of(run, data)
    with RunFolder(tmp_path / "own", training) as folder:
        _, metrics = training.step(folder.begin_or_resume(), training.batch(1))
        folder.record(1, {"loss": metrics["loss"], "temperature": 0.5})
    (row,) = read_metrics(tmp_path / "own")
    assert row["temperature"] == 0.5


def test_a_loss_that_is_no_number_leaves_the_best_checkpoint(run: Path, data: Path, tmp_path: Path) -> None:
    training = training_of(run, data)
    with RunFolder(tmp_path / "own", training) as folder:
        state = folder.begin_or_resume()
        for step, loss in enumerate((6.0, 5.0, math.nan, 5.5, math.inf, None), 1):
            state, metrics = training.step(state, training.batch(step))
            folder.record(step, {**metrics, "step": 99})
            folder.save(state, loss)
        assert folder.best_val_loss() == 5.0
    assert [row["step"] for row in read_metrics(tmp_path / "own")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_of_another_training_or_in_use_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    with RunFolder(own, training_of(run, data)):
        with pytest.raises(UserError, match="another process trains in"):
            RunFolder(own, training_of(run, data))
        with pytest.raises(UserError, match=r"train\.seed was 0, now 7"):
            RunFolder(own, training_of(run, data, seed=7))
    RunFolder(own, training_of(run, data)).__exit__(None, None, None)


def test_a_loop_that_fails_gives_its_folder_free(run: Path, data: Path, tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder(tmp_path / "own", training_of(run, data)) as folder:
            folder.begin_or_resume()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with RunFolder(tmp_path / "own", training_of(run, data)) as folder:
        assert int(folder.begin_or_resume().step) == 0


@pytest.mark.parametrize(
    ("model", "train", "part"),
    [
        ({"vocab_size": 300}, {}, "vocab_size 300, the tokenizer of"),
        ({"block_size": 100_000}, {}, "block_size"),
        ({}, {"batch_size": 3}, "does not divide over 2 devices; choose as --batch-size a multiple of 2"),
        ({}, {"batch_size": 24, "grad_accum_steps": 8}, "over 2 devices; give --grad-accum-steps 6, or"),
    ],
)
def test_what_does_not_fit_the_data_or_the_mesh_is_told_before_anything_is_made(
    run: Path, data: Path, model: dict[str, int], train: dict[str, int], part: str
) -> None:
    config, dataset = read_run_config(run), jaxgpt.open_dataset(data)
    given = dataclasses.replace(config.model, **model), dataclasses.replace(config.train, **train)
    with pytest.raises(UserError, match=part):
        Training(*given, dataset, jaxgpt.make_mesh("", 2))


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"n_layer": 3}, "n_layer is 3, the model of .* has 2"),
        ({"positions": "rotary"}, "positions is 'rotary'"),
        ({"block_size": 65}, "block_size is 65, the model of .* has 64"),
    ],
)
def test_a_shape_that_is_not_the_one_it_begins_with_is_refused(
    run: Path, data: Path, changed: dict[str, Any], part: str
) -> None:
    config, init = read_run_config(run), jaxgpt.open_init_source(run)
    model = dataclasses.replace(config.model, **changed)
    with pytest.raises(UserError, match=part):
        Training(model, config.train, jaxgpt.open_dataset(data), jaxgpt.make_mesh("", 2), init=init)


def test_the_first_state_can_be_asked_for_again(run: Path, data: Path) -> None:
    """The parameters that it begins with are not held: they are read again."""
    config, init = read_run_config(run), jaxgpt.open_init_source(run)
    mesh = jaxgpt.make_mesh("", 2)
    training = Training(config.model, config.train, jaxgpt.open_dataset(data), mesh, init=init)
    first, again = (training.evaluate(training.first_state())["val_loss"] for _ in range(2))
    assert first == again
    best = min(row["val_loss"] for row in read_metrics(run) if "val_loss" in row)
    assert first == pytest.approx(best, abs=1e-6)


ODD = """
import sys, pathlib, jaxgpt
from jaxgpt import ModelConfig, TrainConfig
data, out = sys.argv[1:]
model, train, dataset = ModelConfig(384, 32, 1, 1, 16), TrainConfig(batch_size=8), jaxgpt.open_dataset(data)
mesh = jaxgpt.make_mesh()
training = jaxgpt.Training(model, train, dataset, mesh)
for odd in (
    lambda: jaxgpt.open_dataset(None), lambda: jaxgpt.open_init_source(3),
    lambda: jaxgpt.Training("gpt2", train, dataset, mesh), lambda: jaxgpt.Training(model, {}, dataset, mesh),
    lambda: jaxgpt.Training(model, train, data, mesh),
    lambda: jaxgpt.Training(model, train, dataset, "data=1"),
    lambda: jaxgpt.RunFolder(None, training), lambda: jaxgpt.RunFolder(out, dataset.folder),
    lambda: jaxgpt.RunFolder("gs://bucket/run", training),
    lambda: jaxgpt.RunFolder(data + "/train.bin", training),
):
    try:
        odd()
    except jaxgpt.UserError as error:
        print(error)
with jaxgpt.RunFolder(out, training) as run:
    run.begin_or_resume()
    try:
        run.record(1, {"accuracy": 1.0})
    except jaxgpt.UserError as error:
        print(error)
"""


def test_what_is_no_path_no_training_and_no_loss_is_one_line(data: Path, tmp_path: Path) -> None:
    """In a process of its own: in this one the types of all arguments are watched."""
    line, environment = python(ODD)
    done = subprocess.run(
        [*line, data, tmp_path / "run"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [
        "dataset folder is None, expected a path", "--init is 3, expected a path",
        "model is 'gpt2', expected a ModelConfig", "train is {}, expected a TrainConfig",
        "expected a Dataset", "mesh is 'data=1', expected a Mesh", "folder is None, expected a path",
        "expected a Training", "gs://bucket/run is an address", "train.bin is a file, expected a folder",
        "step 1 has accuracy, expected loss among them",
    ]  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(told), lines
    for part, line in zip(told, lines, strict=True):
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", jaxgpt.__all__)
def test_every_public_name_is_documented_and_where_the_table_says(name: str) -> None:
    module = jaxgpt._PUBLIC[name]
    found = getattr(jaxgpt, name)
    assert found.__doc__
    assert found.__module__ == module
    assert f"`{name}" in (ROOT / "docs" / "training-scripts.md").read_text(encoding="utf-8")


def test_a_name_that_jaxgpt_has_not_is_an_attribute_error() -> None:
    assert sorted(jaxgpt.__all__) == sorted(jaxgpt._PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'Trainning'"):
        _ = jaxgpt.Trainning


def test_importing_jaxgpt_imports_neither_jax_nor_torch() -> None:
    code = (
        "import sys, jaxgpt\n"
        "def heavy(): return sorted({'jax', 'flax', 'torch'} & set(sys.modules))\n"
        "first = heavy(); from jaxgpt import ModelConfig, open_dataset; assert first == heavy() == []\n"
        "from jaxgpt import Training; assert heavy() == ['flax', 'jax'], heavy()"
    )
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_imports_that_the_page_shows_are_there() -> None:
    text = (ROOT / "docs" / "training-scripts.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("from jaxgpt")]
    assert len(lines) >= 4
    exec("\n".join(lines), {})
