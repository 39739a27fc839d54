"""A run that is changed on purpose, and one that is extended."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Command, assert_one_line_error, rows, run_command, write_jsonl
from jaxgpt_export.flax_run.checkpoint import read_checkpoint

import jaxgpt
from jaxgpt.shared.dataset import pack_mask
from jaxgpt.shared.errors import UserError
from jaxgpt.training.options import as_begun
from jaxgpt.training.run.folder import read_metrics, read_run_config
from jaxgpt.training.run.override import adapted, changes
from jaxgpt.training.run.run_folder import RunFolder
from jaxgpt.training.run.summary import read_summary
from jaxgpt.training.run.training import Training

# The rate is constant, so a run of 8 steps that is extended to 12 is one of 12 steps.
SETTINGS = (
    "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 32, "--batch-size", 4,
    "--optimizer", "adamw", "--final-lr-fraction", 1.0, "--warmup-steps", 0, "--eval-every", 4,
    "--checkpoint-every", 4, "--sample-every", 0, "--cpu-devices", 1,
)  # fmt: skip
KEPT = ("config.json", "metrics.jsonl", "summary.json")


def train_arguments(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("train", "tiny", "--data", data, "--out", out, *SETTINGS, *more)


def losses(run: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "grad_norm", "val_loss")
    return [(row["step"], name, row[name]) for row in read_metrics(run) for name in names if name in row]


def last_checksum(run: Path, step: int) -> int:
    text = (run / "checkpoints" / str(step) / "position" / "metadata").read_text()
    return int(json.loads(text)["checksum"])


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in KEPT}


def training_of(run: Path, data: Path, **changed: Any) -> Training:
    config = read_run_config(run)
    model = dataclasses.replace(config.model, dropout=changed.pop("dropout", config.model.dropout))
    train = dataclasses.replace(config.train, **changed)
    return Training(model, train, jaxgpt.open_dataset(data), jaxgpt.make_mesh("", 1), preset="tiny")


@pytest.fixture(scope="module")
def whole(work: Path, data: Path) -> Path:
    """A run of 12 steps."""
    out = work / "override-12"
    assert run_command("jaxgpt", *train_arguments(data, out, "--max-steps", 12)) == 0
    return out


@pytest.fixture(scope="module")
def finished_once(work: Path, data: Path) -> Path:
    """The same of 8 steps."""
    out = work / "override-8"
    assert run_command("jaxgpt", *train_arguments(data, out, "--max-steps", 8)) == 0
    return out


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of the run of 8 steps."""
    shutil.copytree(finished_once, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def other_data(work: Path, data: Path) -> Path:
    """Another data set, with the same tokenizer."""
    source, out = write_jsonl(work / "other.jsonl", rows(200, seed=5)), work / "other"
    arguments = ("--source", source, "--tokenizer", data, "--val-fraction", 0.1, "--out", out)
    assert run_command("jaxgpt", "prepare", *arguments) == 0
    return out


def test_a_finished_run_is_extended_to_the_bits_of_a_longer_one(
    command: Command, finished: Path, whole: Path, data: Path
) -> None:
    """Stopped on its way it goes on without the option; until it is done the summary is of 8 steps."""
    before = contents(finished)
    with RunFolder(finished, training_of(finished, data, max_steps=12), override=True) as run:
        state = run.begin_or_resume()
        assert int(state.step) == 8
        for step in (9, 10):
            state, metrics = run.training.step(state, run.training.batch(step))
            run.record(step, metrics)
        run.save(state)
    assert finished.joinpath("summary.json").read_bytes() == before["summary.json"]
    with pytest.raises(UserError, match="its summary is of 8 steps, its training has 12"):
        read_summary(finished)
    code, _, err = command("jaxgpt", *train_arguments(data, finished, "--max-steps", 12))
    assert code == 0, err
    assert "resuming after step 10" in err
    assert losses(finished) == losses(whole)
    assert last_checksum(finished, 12) == last_checksum(whole, 12)
    config = read_run_config(finished)
    (entry,) = config.overrides
    assert entry["step"] == 8
    assert entry["changed"] == {"train.max_steps": {"from": 8, "to": 12}}
    assert entry["time"].endswith("+00:00")
    assert dataclasses.replace(config, overrides=()) == read_run_config(whole)
    assert b"overrides" not in before["config.json"]
    timed = {"cpu_seconds": 0, "tokens_per_s": 0, "startup_s": 0, "compile_s": 0}
    assert {**read_summary(finished), **timed} == {**read_summary(whole), **timed, "overrides": [entry]}
    assert read_summary(finished)["tokens_seen"] == 12 * 4 * 32


def test_a_run_measures_as_much_as_it_began_with_until_that_is_changed_on_purpose(
    whole: Path, data: Path, command: Command
) -> None:
    """A preset that measures a part does not change how a run of an older version is resumed."""
    config = read_run_config(whole)
    preset = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_tokens=64))
    assert as_begun(preset, whole, frozenset()) == config
    given = as_begun(preset, whole, frozenset({"eval_tokens"}))
    assert given == preset
    refused = command("jaxgpt", *train_arguments(data, whole, "--max-steps", 12, "--eval-tokens", 64))
    assert_one_line_error(refused, "train.eval_tokens was 0, now 64", "--override")
    changed = {"step": 4, "changed": {"train.eval_tokens": {"from": 0, "to": 64}}}
    assert dataclasses.replace(preset, overrides=(changed,)).data_since == 4


def test_overriding_with_nothing_changed_changes_nothing(command: Command, whole: Path, data: Path) -> None:
    """Neither with all settings nor with few, for what is not given stays."""
    before = contents(whole)
    for given in (
        train_arguments(data, whole, "--max-steps", 12),
        ("train", "tiny", "--data", data, "--out", whole),
    ):
        code, _, err = command("jaxgpt", *given, "--cpu-devices", 1, "--override")
        assert code == 0, err
        assert "nothing left to do" in err
        assert "changed after" not in err
    assert contents(whole) == before


def test_a_summary_that_a_kill_left_out_is_written_by_the_same_command(
    command: Command, finished: Path, data: Path
) -> None:
    expected = read_summary(finished)
    (finished / "summary.json").unlink()
    assert command("jaxgpt", *train_arguments(data, finished, "--max-steps", 8))[0] == 0
    found = read_summary(finished)
    assert found.pop("cpu_seconds") == pytest.approx(expected.pop("cpu_seconds"), rel=0.5)
    del expected["startup_s"], expected["compile_s"]  # of a start that trained nothing none is told
    assert found == expected


@pytest.fixture(scope="module")
def overridden(work: Path, data: Path, finished_once: Path, other_data: Path) -> Path:
    """The run of 8 steps, converted, then changed in much of its settings, and converted again."""
    out = work / "overridden"
    shutil.copytree(finished_once, out)
    assert run_command("jaxgpt-export", "convert", "--run", out, "--out", work / "overridden-before") == 0
    changed = ("--batch-size", 8, "--grad-accum-steps", 2, "--learning-rate", 1e-6, "--seed", 3)
    more = ("--embedding-learning-rate", 1e-6, "--max-steps", 16, "--data", other_data, "--override")
    assert run_command("jaxgpt", *train_arguments(data, out, *changed, *more)) == 0
    assert run_command("jaxgpt-export", "convert", "--run", out, "--out", work / "overridden-after") == 0
    return out


def test_changed_settings_and_data_are_recorded_and_hold_from_there_on(
    overridden: Path, data: Path, other_data: Path
) -> None:
    """Tokens are counted by the batch of their time; losses on other data are not compared."""
    config = read_run_config(overridden)
    found = {name: (each["from"], each["to"]) for name, each in config.overrides[0]["changed"].items()}
    assert found.pop("data")[1]["folder"] == str(other_data)
    rate = found["train.learning_rate"][0]
    assert found == {
        "train.batch_size": (4, 8), "train.grad_accum_steps": (1, 2), "train.learning_rate": (rate, 1e-6),
        "train.embedding_learning_rate": (0.04, 1e-6), "train.max_steps": (8, 16), "train.seed": (0, 3),
    }  # fmt: skip
    assert (config.data["folder"], config.data_since) == (str(other_data), 8)
    taken = [row for row in read_metrics(overridden) if "loss" in row]
    assert [row["tokens_seen"] for row in taken] == [*range(128, 1025, 128), *range(1280, 3073, 256)]
    assert [row["learning_rate"] for row in taken] == [rate] * 8 + [1e-6] * 8
    times = [row["time"] for row in taken]
    assert times == sorted(times)
    val = {row["step"]: row["val_loss"] for row in read_metrics(overridden) if "val_loss" in row}
    now = {step: loss for step, loss in val.items() if step > 8}
    assert min(val.values()) < min(now.values())
    summary = read_summary(overridden)
    assert summary["best_val_loss"] == min(now.values())
    assert summary["convert_step"] == summary["best_step"] == min(now, key=lambda step: now[step])
    assert summary["tokens_seen"] == 3072


def test_artifacts_name_the_data_and_the_changes_that_they_come_from(
    command: Command, finished_once: Path, overridden: Path, work: Path, data: Path, other_data: Path
) -> None:
    """The artifact of a step before the change still comes from this run, where that was put aside."""

    def origin(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((work / f"overridden-{name}" / "certificate.json").read_text())
        return dict(found["origin"])

    before, after = origin("before"), origin("after")
    assert "overrides" not in before
    assert after["step"] == read_summary(overridden)["convert_step"]
    assert after["data"]["folder"] == str(other_data)
    assert after["overrides"] == list(read_run_config(overridden).overrides)
    with pytest.raises(
        UserError, match=r"step '8' is not stored; expected best, latest or one of \[12, 16\]"
    ):
        read_checkpoint(overridden, "8")
    shutil.copytree(finished_once / "checkpoints" / "8", overridden / "checkpoints" / "8")
    checkpoint = read_checkpoint(overridden, "8")
    assert checkpoint.data["folder"] == before["data"]["folder"] == str(data)
    assert checkpoint.overrides == []
    given = ("verify", "--artifact", work / "overridden-before", "--run", overridden)
    code, _, err = command("jaxgpt-export", *given)
    assert code == 0, err


def as_it_is(run: Path) -> None:
    """Change nothing."""


def without_checkpoints(run: Path) -> None:
    """Leave what a process killed before its first checkpoint leaves, of a run that began with another."""
    shutil.rmtree(run / "checkpoints")
    config = json.loads((run / "config.json").read_text())
    config["init"] = {"folder": "gone", "kind": "run", "step": 3, "sha256": "ab" * 32}
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("more", "parts", "prepared"),
    [
        (("--n-layer", 2), ("model.n_layer was 1, now 2", "--out ANOTHER"), as_it_is),
        (("--qat",), ("model.qat was False, now True", "--init"), as_it_is),
        (("--optimizer", "muon", "--seed", 2), ("change train.optimizer was adamw, now muon:",), as_it_is),
        (("--vocab-multiple", 500), ("train.vocab_multiple was 1, now 500",), as_it_is),
        (("--learning-rate", 0.5), ("8 steps done", "give --max-steps above 8"), as_it_is),
        (("--loss-chunks", 2), ("8 steps done", "give --max-steps above 8"), as_it_is),
        (("--max-steps", 6), ("max_steps is 6", "give --max-steps above 8"), as_it_is),
        (("--max-steps", 12), ("init was run abababababab... step 3", "give --init"), without_checkpoints),
    ],
)  # fmt: skip
def test_what_can_not_be_overridden_is_one_line_and_changes_nothing(
    command: Command, finished: Path, data: Path, more: tuple[object, ...], parts: tuple[str, ...],
    prepared: Callable[[Path], None],
) -> None:  # fmt: skip
    prepared(finished)
    before = contents(finished)
    result = command("jaxgpt", *train_arguments(data, finished, "--override", *more))
    assert_one_line_error(result, *parts)
    assert contents(finished) == before


def test_another_tokenizer_or_preset_or_no_run_is_one_line(
    command: Command, finished: Path, data: Path, work: Path, tmp_path: Path
) -> None:
    other = tmp_path / "words"
    arguments = (
        "--source",
        work / "rows.jsonl",
        "--tokenizer",
        "bpe:300",
        "--val-fraction",
        0.1,
        "--out",
        other,
    )
    assert run_command("jaxgpt", "prepare", *arguments) == 0
    result = command("jaxgpt", *train_arguments(other, finished, "--override", "--max-steps", 12))
    assert_one_line_error(result, "can't change the tokenizer", f"--tokenizer {finished / 'tokenizer'}")
    given = ("train", "small", "--data", data, "--out", finished, "--override")
    assert_one_line_error(command("jaxgpt", *given), "began from preset tiny", "names small")
    result = command("jaxgpt", *train_arguments(data, tmp_path / "none", "--override"))
    assert_one_line_error(result, "run folder", "is missing")
    assert not (tmp_path / "none").exists()


def test_without_the_option_the_refusal_names_it_and_init(
    command: Command, finished: Path, data: Path
) -> None:
    result = command("jaxgpt", *train_arguments(data, finished, "--max-steps", 12))
    assert_one_line_error(result, "train.max_steps was 8, now 12", "--override", f"--init {finished}")


def test_dropout_may_change_though_it_is_a_setting_of_the_model(finished: Path, data: Path) -> None:
    config = read_run_config(finished)
    model, train = (
        dataclasses.replace(config.model, dropout=0.5),
        dataclasses.replace(config.train, max_steps=9),
    )
    training = Training(model, train, jaxgpt.open_dataset(data), jaxgpt.make_mesh("", 1))
    assert changes(finished, training) == {"model.dropout": (0.0, 0.5), "train.max_steps": (8, 9)}


def test_the_loss_scale_follows_the_precision_and_the_random_key_the_seed(finished: Path, data: Path) -> None:
    half = training_of(finished, data, precision="fp16", seed=9)
    state = training_of(finished, data).first_state()
    taken = adapted(state, "fp32", half)
    assert float(taken.guard.loss_scale) == 2.0**15
    assert np.array_equal(taken.rng, jax.random.key_data(jax.random.key(9)))
    assert adapted(taken, "fp16", half) is taken
    shrunk = taken._replace(guard=taken.guard._replace(loss_scale=jnp.float32(1), since_growth=jnp.int32(7)))
    assert adapted(shrunk, "fp16", half) is shrunk
    back = adapted(
        taken, None, training_of(finished, data)
    )  # of a checkpoint that does not name its precision
    assert float(back.guard.loss_scale) == 1.0
    assert np.array_equal(back.rng, jax.random.key_data(jax.random.key(0)))


@pytest.mark.parametrize(
    ("changed", "forgets"),
    [
        ({"batch_size": 8}, True), ({"prompt_loss_weight": 0.5}, True), ({"dropout": 0.1}, True),
        ({"seed": 3}, False),
    ],
)  # fmt: skip
def test_the_spike_guard_forgets_the_losses_of_other_batches(
    finished: Path, data: Path, changed: dict[str, Any], forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it may skip each step for ever, as none that is skipped enters its mean."""
    if "prompt_loss_weight" in changed:  # of data that tell prompts from answers
        dataset = jaxgpt.open_dataset(data)
        masked = dataclasses.replace(dataset, train_mask=pack_mask(np.ones(len(dataset.train), bool)))
        monkeypatch.setattr(jaxgpt, "open_dataset", lambda folder: masked)
    training = training_of(finished, data, max_steps=12, **changed)
    for override in (True, False):  # without the option, as it was killed before it saved
        with RunFolder(finished, training, override) as run:
            guard = run.begin_or_resume().guard
        assert (int(guard.losses) == 0) == forgets
        assert (float(guard.loss_mean) == float(guard.loss_variance) == 0.0) == forgets
        assert int(guard.skipped_in_row) == 0
