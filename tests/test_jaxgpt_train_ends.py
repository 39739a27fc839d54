"""How a training ends: stopped at its very last step, diverged, on a full disk of one process."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error
from test_jaxgpt_processes import free_port, run_both, train_code

from jaxgpt.training.devices.stop_signal import StopSignal
from jaxgpt.training.run.folder import read_metrics
from jaxgpt.training.run.recorder import Recorder
from jaxgpt.training.run.training import Training

LAST = 6
SHORT = (*TINY_SHAPE, *TINY_TRAIN, "--max-steps", LAST, "--sample-every", 0)


@pytest.mark.parametrize("eval_every", [100, 4])
def test_a_stop_at_the_last_step_leaves_a_finished_run(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: int
) -> None:
    out = tmp_path / "run"
    train = ("jaxgpt", "train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *SHORT)
    with monkeypatch.context() as signals:
        signals.setattr(StopSignal, "requested", lambda _, step: step == LAST)
        code, _, err = command(*train, "--eval-every", eval_every)
    assert code == 0, err
    measured = {row["step"]: row["val_loss"] for row in read_metrics(out) if "val_loss" in row}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["val_loss"]) == (LAST, measured[LAST])
    assert summary["convert_step"] in measured


def test_a_stop_where_the_loss_was_to_be_measured_loses_no_validation(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only saves; the resumed run measures then, and has the figures of one that never stopped."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    train = ("jaxgpt", "train", "tiny", "--data", data, "--cpu-devices", 2, *SHORT, "--eval-every", 2)
    given = (*train, "--checkpoint-every", 2, "--out")
    assert command(*given, whole)[0] == 0
    with monkeypatch.context() as signals:
        signals.setattr(StopSignal, "requested", lambda _, step: step == 4)
        assert command(*given, out)[0] == 0
    assert [row["step"] for row in read_metrics(out) if "val_loss" in row] == [2]
    assert command(*given, out)[0] == 0

    def figures(run: Path) -> list[tuple[object, ...]]:
        return [(row["step"], row.get("loss"), row.get("val_loss")) for row in read_metrics(run)]

    assert figures(out) == figures(whole)
    stored = [run / "checkpoints" / "4" / "position" / "metadata" for run in (whole, out)]
    expected, found = (json.loads(path.read_text())["val_loss"] for path in stored)
    assert expected is not None
    assert found == expected


def test_a_validation_that_finds_no_memory_costs_no_step(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled when it is due first, and then takes memory that no step took."""
    out = tmp_path / "run"
    train = ("jaxgpt", "train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *SHORT)
    given = (*train, "--eval-every", 3, "--checkpoint-every", LAST)

    def lacks_memory(self: Training, state: object) -> dict[str, float]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    with monkeypatch.context() as full:
        full.setattr(Training, "evaluate", lacks_memory)
        code, _, err = command(*given)
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "error: validation after step 3 finds no memory, the step is saved"
    )
    assert "Traceback" not in err
    code, _, err = command(*given, "--override", "--loss-chunks", 2)
    assert code == 0, err
    rows = read_metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, LAST + 1)]
    assert [row["step"] for row in rows if "val_loss" in row][-1] == LAST


def test_a_last_validation_that_finds_no_memory_is_made_with_less(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train = ("jaxgpt", "train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *SHORT)
    given = (*train, "--eval-every", LAST, "--checkpoint-every", LAST)

    def lacks_memory(self: Training, state: object) -> dict[str, float]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    with monkeypatch.context() as full:
        full.setattr(Training, "evaluate", lacks_memory)
        for _ in range(2):  # the second time nothing is left but the validation
            code, _, err = command(*given)
            assert code == 2
            assert f"validation after step {LAST} finds no memory, the step is saved" in err.splitlines()[-1]
            assert "Traceback" not in err
    code, _, err = command(*given, "--override", "--loss-chunks", 2)
    assert code == 0, err
    assert [row["step"] for row in read_metrics(out) if "val_loss" in row] == [LAST]
    assert_one_line_error(command(*given, "--override", "--learning-rate", 0.5), "give --max-steps above")


def test_a_disk_that_is_full_for_tensorboard_alone_ends_its_files_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The thread that writes them has died: nobody reads its queue any more."""
    recorder = Recorder(tmp_path, 0, 100, 1, None)
    assert recorder._board is not None
    writer = recorder._board.file_writer.event_writer
    writer._worker.stop()
    for step in range(1, 41):
        recorder.step(step, {"loss": 1.0})
    recorder.sample(41, "a text")
    recorder.close()
    assert len(read_metrics(tmp_path)) == 40
    assert capfd.readouterr().err.count("TensorBoard's files can't be written any more") == 1


def test_a_run_whose_last_step_was_not_measured_is_measured_then(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    summary = json.loads((own / "summary.json").read_text())
    (own / "summary.json").unlink()
    lines = (own / "metrics.jsonl").read_text().splitlines(keepends=True)
    (own / "metrics.jsonl").write_text("".join(line for line in lines if "val_loss" not in line))
    given = (*TINY_SHAPE, *TINY_TRAIN)
    code, _, err = command(
        "jaxgpt", "train", "tiny", "--data", data, "--out", own, "--cpu-devices", 2, *given
    )
    assert code == 0, err
    again = json.loads((own / "summary.json").read_text())
    assert (again["val_loss"], again["steps"]) == (summary["val_loss"], summary["steps"])


def test_a_training_that_diverged_is_one_line_and_its_metrics_are_json(
    command: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    wild = ("--learning-rate", 1e30, "--embedding-learning-rate", 1e30, "--grad-clip", 1e30)
    train = ("jaxgpt", "train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *SHORT, *wild)
    for _ in range(2):
        code, _, err = command(*train, "--optimizer", "adamw", "--warmup-steps", 0)
        assert code == 2
        assert err.splitlines()[-1].startswith(f"error: the training in {out} diverged")
        assert "Traceback" not in err
    assert not (out / "summary.json").exists()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    assert any(row["val_loss"] != row["val_loss"] for row in read_metrics(out) if "val_loss" in row)


def test_what_the_system_refuses_to_process_0_ends_both_with_code_2(
    run: Path, data: Path, tmp_path: Path
) -> None:
    own, port = shutil.copytree(run, tmp_path / "run"), free_port()
    shutil.rmtree(own / "tokenizer")
    (own / "tokenizer").write_text("no folder")
    done = run_both([train_code(data, own, port, index, *TINY_TRAIN) for index in range(2)], timeout=120)
    assert [process.returncode for process in done] == [2, 2], done[0].stderr + done[1].stderr
    assert "tokenizer: File exists" in done[0].stderr
    assert "process 0 stopped" in done[1].stderr


def test_a_disk_that_is_full_for_one_process_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    port = free_port()
    full = (
        "from jaxgpt.training.run.recorder import Recorder\n"
        "def step(*_): raise OSError(28, 'No space left on device', 'metrics.jsonl')\n"
        "Recorder.step = step\n"
    )
    codes = [train_code(data, tmp_path / "run", port, index, *SHORT) for index in range(2)]
    done = run_both([full + codes[0], codes[1]], timeout=120)
    assert done[0].returncode == 2, done[0].stderr
    assert "metrics.jsonl: no space left on device" in done[0].stderr.splitlines()[-1]
    assert done[1].returncode != 0


def test_evaluating_on_the_run_s_own_data_wants_it_as_it_was(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    other = shutil.copytree(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["split"]["val_fraction"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    config = (own / "config.json").read_text()
    (own / "config.json").write_text(config.replace(json.dumps(str(data)), json.dumps(str(other))))
    assert_one_line_error(command("jaxgpt", "evaluate", "--run", own), "prepared again", f"--data {other}")
    assert command("jaxgpt", "evaluate", "--run", own, "--data", other)[0] == 0
