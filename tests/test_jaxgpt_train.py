import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, python

import jaxgpt.training.run.run_folder
import jaxgpt.training.trainer
from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.config import TrainConfig
from jaxgpt.shared.console import parse
from jaxgpt.training.lr_schedule import schedule
from jaxgpt.training.options import TrainOptions
from jaxgpt.training.run.checkpoints import Checkpoints, load_params
from jaxgpt.training.run.folder import open_run, read_metrics, read_run_config
from jaxgpt.training.run.learning_rates import LearningRates
from jaxgpt.training.run.recorder import make_recorder
from jaxgpt.training.step.state import Guard, TrainState
from jaxgpt.training.trainer import warn


def training_losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def train_command(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "jaxgpt",
        "train",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--cpu-devices",
        2,
        *TINY_SHAPE,
        *TINY_TRAIN,
        *more,
    )


def test_training_lowers_the_loss_and_records_every_step(run: Path) -> None:
    losses = training_losses(run)
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses[-1][1] < losses[0][1] - 1.0
    summary = json.loads((run / "summary.json").read_text())
    val = [row for row in read_metrics(run) if "val_loss" in row]
    assert [row["step"] for row in val] == [20, 40]
    assert summary["val_loss"] == val[-1]["val_loss"]
    assert summary["cpu_seconds"] > 0
    assert 0 < summary["compile_s"] < summary["startup_s"]
    best = min(val, key=lambda row: row["val_loss"])
    assert (summary["best_step"], summary["best_val_loss"]) == (best["step"], best["val_loss"])
    assert summary["convert_step"] == best["step"]
    assert list((run / "tensorboard").iterdir())
    assert (run / "samples" / "step_00000040.txt").read_text().strip()


def test_every_step_records_its_rates(run: Path) -> None:
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert all(isinstance(row["skipped"], int) for row in rows)
    timed = [row for row in rows if "step_ms" in row]
    assert len(timed) == 38  # not the first one, nor the first one after the validation of step 20
    for row in timed:
        assert row["step_ms"] > 0
        assert 0 <= row["input_wait"] < 1
        assert row["tokens_per_s"] == pytest.approx(8 * 64 / row["step_ms"] * 1e3, rel=1e-2)
        assert "mfu" not in row  # no datasheet gives a CPU's
    assert [row["tokens_seen"] for row in rows] == [step * 8 * 64 for step in range(1, 41)]
    rate = schedule(read_run_config(run).train, 0.01)
    assert [row["learning_rate"] for row in rows] == pytest.approx([float(rate(step)) for step in range(40)])
    started = (run / "config.json").stat().st_mtime
    assert all(started - 1 < row["time"] < started + 3600 for row in rows)


def test_the_rates_of_steps_are_those_of_the_schedule() -> None:
    config = TrainConfig(max_steps=3000, warmup_steps=2000, learning_rate=1.0)
    rates, rate = LearningRates(config), schedule(config, 1.0)
    for step in (1, 1024, 1025, 2048, 3000, 7):
        assert rates.at(step) == pytest.approx(float(rate(step - 1)), abs=1e-6)


def test_mfu_is_the_share_of_the_devices_peak(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxgpt.training.run.run_folder, "peak_flops", lambda kind, precision: 1e12)
    arguments = (*train_command(data, tmp_path / "run"), "--max-steps", 5, "--sample-every", 0)
    code, _, err = command(*arguments)
    assert code == 0
    assert "MFU is of 1 TFLOP/s fp32 on each cpu" in err
    assert re.search(r"\nfirst step after \d+\.\d s, of which compiling \d+\.\d s\nstep 1/5 ", err)
    row = [row for row in read_metrics(tmp_path / "run") if "loss" in row][-1]
    model = read_run_config(tmp_path / "run").model
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops_per_token(model) / 2e12, abs=1e-4)


def test_a_step_that_would_not_fit_is_one_line_and_leaves_no_run(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxgpt.training.trainer, "free_device_bytes", lambda: 1e6)
    code, _, err = command(*train_command(data, tmp_path / "run"))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert re.match(r"error: a training step needs 0\.\d\d GB on each device", last), last
    assert "0.00 GB are free" in last
    assert "--grad-accum-steps" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_padded_token_table_is_read_without_its_padding(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert command(*train_command(data, out, "--vocab-multiple", 500))[0] == 0
    for (_, plain), (_, padded) in zip(training_losses(run), training_losses(out), strict=True):
        assert padded == pytest.approx(plain, abs=2e-3)  # 40 steps amplify rounding
    _, params = load_params(open_run(out), "latest")
    assert params["wte.embedding"].shape == (384, 32)
    assert command("jaxgpt", "sample", "--run", out, "--prompt", "Write", "--max-new-tokens", 5)[0] == 0
    assert command("jaxgpt-export", "convert", "--run", out, "--out", tmp_path / "fp32")[0] == 0


def test_killed_training_resumes_bit_for_bit(run_alone: Path, data: Path, tmp_path: Path) -> None:
    """kill -9 after the checkpoint of step 20; the other 20 steps must give the very same losses."""
    out = tmp_path / "run"
    code = f"from jaxgpt.cli import main; main({[str(a) for a in train_command(data, out)[1:]]!r})"
    arguments, environment = python(code)
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "20" / "_CHECKPOINT_METADATA").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "metrics.jsonl").open("a").write('{"step": 99, "lo')  # what a kill may leave
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    assert "resuming after step" in done.stderr
    assert training_losses(out) == training_losses(run_alone)


def as_version_2(run: Path) -> None:
    """Rewrite config.json as format version 2 wrote it."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    names = {
        "grad_accum_steps": "accumulate",
        "embedding_learning_rate": "embedding_rate",
        "final_lr_fraction": "final_rate",
        "lr_schedule": "cooldown",
    }
    assert names.keys() <= config["train"].keys()
    config["train"] = {names.get(name, name): value for name, value in config["train"].items()}
    path.write_text(json.dumps({**config, "format_version": 2}))


def test_a_run_of_format_version_2_is_read_and_resumes_to_the_same_bits(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    as_version_2(out)
    new, old = (
        json.loads(command("jaxgpt", "evaluate", "--run", folder, "--json")[1]) for folder in (run, out)
    )
    assert old == new
    shutil.rmtree(out / "checkpoints" / "40")
    (out / "summary.json").unlink()
    arguments = [str(argument) for argument in train_command(data, out)]
    arguments[arguments.index("--embedding-learning-rate")] = "--embedding-rate"
    code, _, err = command(*arguments)
    assert code == 0, err
    assert "resuming after step 20" in err
    assert training_losses(out) == training_losses(run)


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--accumulate", 4, "grad_accum_steps"),
        ("--embedding-rate", 0.25, "embedding_learning_rate"),
        ("--embedding_rate", 0.25, "embedding_learning_rate"),
        ("--final-rate", 0.5, "final_lr_fraction"),
        ("--cooldown", "cosine", "lr_schedule"),
    ],
)
def test_flags_are_taken_under_their_old_names(flag: str, value: object, name: str) -> None:
    required = ["tiny", "--data", "DATA", "--out", "RUN"]
    for given in ([flag, str(value)], [f"{flag}={value}"]):
        options = parse(TrainOptions, "jaxgpt train", [*required, *given])
        assert getattr(options.training, name) == value
        assert name in options.given


def test_every_renamed_flag_exists_and_help_shows_its_name_of_now_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(TrainOptions, "jaxgpt train", ["--help"])
    words = capsys.readouterr().out.replace("=", " ").split()
    assert len(TrainOptions.RENAMED) == 4
    for old, new in TrainOptions.RENAMED.items():
        assert new in words
        assert old not in words


def test_running_a_finished_training_again_changes_nothing(command: Command, run: Path, data: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "config.json")}
    code, _, err = command(*train_command(data, run))
    assert code == 0
    assert "nothing left to do" in err
    assert {name: (run / name).read_bytes() for name in before} == before


def test_other_settings_in_the_same_folder_are_refused_by_name(
    command: Command, run: Path, data: Path
) -> None:
    result = command(*train_command(data, run, "--seed", 7))
    assert_one_line_error(result, "train.seed was 0, now 7", "another --out")


def test_latest_and_best_checkpoints_stay(tmp_path: Path) -> None:
    """The loss is lowest at step 20, and step 50 was saved without measuring it."""
    checkpoints = Checkpoints(tmp_path)
    guard = Guard(*[jnp.zeros(())] * 7)
    for step, val_loss in ((10, 3.0), (20, 2.0), (30, 4.0), (40, 5.0), (50, None)):
        array = jnp.full((2, 2), float(step))
        state = TrainState(
            {"wte.embedding": array}, {"mu": array}, jnp.int32(step), jnp.zeros(2, jnp.uint32), guard
        )
        checkpoints.save(state, {"step": step}, val_loss)
    checkpoints.close()
    kept = Checkpoints(tmp_path, read_only=True)
    assert kept.steps() == [20, 40, 50]
    assert kept.best() == kept.resolve("best") == 20
    assert kept.latest() == kept.resolve("latest") == 50
    abstract = {"wte.embedding": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    assert float(kept.restore_params(20, abstract)["wte.embedding"][0, 0]) == 20.0
    kept.close()


def test_unknown_preset_is_one_line(command: Command, data: Path, tmp_path: Path) -> None:
    result = command("jaxgpt", "train", "tinny", "--data", data, "--out", tmp_path / "r")
    assert_one_line_error(result, "'tinny'", "did you mean tiny")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--n-embd", 33), ("n_embd (33)", "n_head (2)", "32 or 34")),
        (("--batch-size", 9), ("9 sequences", "2 devices")),
        (("--mesh", "data=3"), ("data=3", "needs 3 devices")),
        (("--block-size", 100_000), ("validation split", "one window needs")),
        (("--max-steps", 0), ("max_steps (0)",)),
        (("--cpu-devices", 100_000), ("cpu_devices (100000)", "[0, 1024]")),
    ],
)
def test_settings_that_can_not_work_are_one_line_and_leave_no_run(
    command: Command, data: Path, tmp_path: Path, more: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    assert_one_line_error(command(*train_command(data, tmp_path / "r", *more)), *parts)
    assert not (tmp_path / "r").exists()


def test_where_no_run_can_be_written_is_told_before_anything_is_read(
    command: Command, tmp_path: Path
) -> None:
    nowhere = ("jaxgpt", "train", "tiny", "--data", tmp_path / "none", "--out")
    (tmp_path / "file").write_text("")
    assert_one_line_error(command(*nowhere, tmp_path / "file" / "run"), "is a file, expected a folder")
    with contextlib.chdir(tmp_path):
        assert_one_line_error(command(*nowhere, "gs://bucket/run"), "gs://bucket/run is an address")
    assert os.listdir(tmp_path) == ["file"]


def test_a_warm_up_that_takes_all_steps_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    warn(TrainConfig(warmup_steps=100, max_steps=50))
    line = " ".join(capfd.readouterr().err.split())
    assert line.startswith("WARNING: warmup_steps (100) is not below max_steps (50)")
    warn(TrainConfig(warmup_steps=49, max_steps=50))
    assert capfd.readouterr().err == ""


def test_without_tensorboardx_a_training_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    recorder = make_recorder(tmp_path, 0, 3, 8, None)
    recorder.step(1, {"loss": 2.0})
    recorder.sample(1, "text")
    recorder.close()
    assert "tensorboardX is not installed" in capfd.readouterr().err
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.0]
    assert not (tmp_path / "tensorboard").exists()


def test_damaged_dataset_is_one_line(command: Command, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    with (tmp_path / "d" / "train.bin").open("ab") as file:
        file.write(b"xx")
    assert_one_line_error(command(*train_command(tmp_path / "d", tmp_path / "r")), "train.bin", "manifest")


def test_folder_with_other_things_is_not_touched(command: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_one_line_error(command(*train_command(data, tmp_path)), "is no run", "another --out")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_damaged_checkpoint_is_one_line(command: Command, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "40" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = command("jaxgpt", "evaluate", "--run", tmp_path / "run", "--step", "40")
    assert_one_line_error(result, "checkpoints/40", "can't be read")


@pytest.mark.parametrize("bad", [b"5\n", b"\xff\xfe\n", b"{]\n"])
def test_damaged_metrics_lose_no_other_line(
    command: Command, run: Path, data: Path, tmp_path: Path, bad: bytes
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], bad, *lines[6:]]))
    assert command(*train_command(data, tmp_path / "run"))[0] == 0
    assert len(read_metrics(tmp_path / "run")) == len(lines) - 1
