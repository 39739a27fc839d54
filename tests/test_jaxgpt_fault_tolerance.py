"""What happens to a training when the machine, the scheduler or the numbers misbehave."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, python

from jaxgpt.training.run.checkpoints import Checkpoints, checksum
from jaxgpt.training.run.folder import lock_run, read_metrics
from jaxgpt.training.run.full_disk import quiet_threads, told_as_os_error
from jaxgpt.training.step.state import Guard, TrainState


def arguments(data: Path, out: Path, *more: object) -> list[str]:
    given = ("train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *TINY_SHAPE, *TINY_TRAIN)
    return [str(argument) for argument in (*given, *more)]


def start(*argv: str) -> subprocess.Popen[str]:
    command, environment = python(f"import sys; from jaxgpt.cli import main; sys.exit(main({list(argv)!r}))")
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while max(losses(run), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    run_alone: Path, data: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start(*arguments(data, out, "--sample-every", 0))
    wait_for_step(process, out, 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    done = max(losses(out))
    assert f"step {done} is saved" in err
    assert "the same command goes on" in err
    assert (out / "checkpoints" / str(done)).is_dir()
    again = start(*arguments(data, out, "--sample-every", 0))
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"resuming after step {done}" in err
    assert losses(out) == losses(run_alone)


def damage(folder: Path, how: str) -> None:
    """Cut the data files of a checkpoint in half, or flip one bit in the middle of each."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        if how == "truncated":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied", "position of another", "position cut"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    command: Command, run: Path, data: Path, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    if how == "emptied":
        shutil.rmtree(out / "checkpoints" / "40" / "params")
    elif how.startswith("position"):
        path = out / "checkpoints" / "40" / "position" / "metadata"
        position = json.loads(path.read_text())
        path.write_text(json.dumps({"step": 40} if how.endswith("cut") else {**position, "step": 41}))
    else:
        damage(out / "checkpoints" / "40", how)
    code, _, err = command("jaxgpt", *arguments(data, out))
    assert code == 0, err
    assert "WARNING" in err
    assert "resuming after step 20" in err
    assert [folder.name.split("-")[0] for folder in (out / "damaged").iterdir()] == ["40"]
    assert losses(out) == losses(run)


def test_no_whole_checkpoint_is_one_clear_end_and_never_a_silent_new_start(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for step in ("20", "40"):
        damage(out / "checkpoints" / step, "flipped")
    code, _, err = command("jaxgpt", *arguments(data, out))
    assert code == 2
    last = err.splitlines()[-1]
    assert all(part in last for part in ("is whole", str(out / "checkpoints" / "40"), "none was moved"))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["20", "40"]
    assert not (out / "damaged").exists()


def test_any_changed_bit_or_order_changes_the_checksum() -> None:
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)

    def of(changed: np.ndarray, step: int = 3) -> int:
        zero = jnp.zeros(())
        return checksum(
            TrainState({"w": jnp.asarray(changed)}, {}, jnp.int32(step), jnp.zeros(2), Guard(*[zero] * 7))
        )

    seen = {of(array), of(array, step=4), of(array[::-1]), of(array[:, ::-1])}
    assert len(seen) == 4
    for bit in range(32):
        changed = array.copy()
        changed.view(np.uint32)[3, 2] ^= np.uint32(1) << np.uint32(bit)
        assert of(changed) != of(array)
    devices = np.array(jax.devices()[:7])
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.sharding.PartitionSpec("x"))
    assert of(jax.device_put(array, sharding)) == of(array)


def test_two_runs_can_not_write_into_one_folder(
    command: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    with lock_run(out):
        assert_one_line_error(command("jaxgpt", *arguments(data, out)), "another process trains in")
    assert command("jaxgpt", *arguments(data, out))[0] == 0


def test_too_many_bad_steps_in_a_row_stop_the_run_at_the_last_good_state(
    command: Command, data: Path, tmp_path: Path
) -> None:
    more = (
        "--learning-rate",
        1e38,
        "--embedding-learning-rate",
        1e38,
        "--max-skipped",
        3,
        "--sample-every",
        0,
    )
    code, _, err = command("jaxgpt", *arguments(data, tmp_path / "run", *more))
    assert code == 1, err
    assert "in a row were not finite" in err
    assert "was skipped" in err
    (step,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert step < 40
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1.2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_with_one_line_and_earlier_checkpoints_stay_whole(
    command: Command, data: Path, small_disk: Path
) -> None:
    out = small_disk / "run"
    argv = arguments(data, out, "--sample-every", 0, "--checkpoint-every", 1, "--max-steps", 12)
    process = start(*argv)  # what libraries print themselves is seen there alone
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert re.search(rf"^error: {out}/\S+: no space left .* of [\d,]+ bytes; free some", err.splitlines()[-1])
    others = [
        line
        for line in err.splitlines()[:-1]
        if not line.startswith(("step", "first step", "tiny", "compiling"))
    ]
    assert all("no MFU" in line for line in others), err
    assert [path for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    code, _, err = command("jaxgpt", *argv)
    assert code == 0, err
    assert "resuming after step" in err
    assert max(losses(out)) == 12


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), errno.EDQUOT),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed to write 5 bytes: File too large [OS error 27]"),
            errno.EFBIG,
        ),
        (RuntimeError("a save failed: No space left on device"), errno.ENOSPC),
        (OSError(errno.EIO, os.strerror(errno.EIO)), errno.EIO),
        (ValueError("UNKNOWN: Error writing: Read-only file system [OS error 30]"), errno.EROFS),
        (RuntimeError("a save failed: Stale file handle"), errno.ESTALE),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), errno.EACCES),
    ],
)
def test_whoever_meets_a_full_or_failing_disk_it_becomes_one_os_error(error: Exception, number: int) -> None:
    def write() -> None:
        with told_as_os_error(Path("here"), "a checkpoint of 5 bytes"):
            raise error

    with pytest.raises(OSError, match="for a checkpoint of 5 bytes") as found:
        write()
    assert (found.value.errno, found.value.filename) == (number, "here")


def test_an_error_that_no_full_disk_made_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), told_as_os_error(Path("here"), "a checkpoint"):
        raise ZeroDivisionError


def test_what_asyncio_tells_of_a_task_that_met_a_full_disk_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Orbax writes in tasks; that of a save which failed elsewhere first is never asked how it went."""
    full = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
    with quiet_threads():
        for error in (full, ValueError("another")):
            logging.getLogger("asyncio").error("never retrieved", exc_info=(ValueError, error, None))
    logging.getLogger("asyncio").error("after", exc_info=(ValueError, full, None))
    told = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert told == ["another", str(full)]


def test_a_save_that_failed_is_told_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only at the next save, which may be an hour away."""
    checkpoints = Checkpoints(tmp_path / "run")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", lambda: (_ for _ in ()).throw(full))
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
    checkpoints.raise_failed_save()
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: False)
    with pytest.raises(OSError, match="for a checkpoint of"):
        checkpoints.raise_failed_save()


@pytest.mark.slow
def test_resuming_on_other_devices_gives_the_same_losses(
    command: Command, data: Path, tmp_path: Path
) -> None:
    """data=4, killed; fsdp=2, killed; one device: against one device from the start."""
    slow = ("--learning-rate", 1e-3, "--embedding-learning-rate", 1e-3)
    small = (*slow, "--sample-every", 0, "--checkpoint-every", 10)

    def argv(out: Path, devices: int, *more: object) -> list[str]:
        given = arguments(data, out, *small, *more)
        given[given.index("--cpu-devices") + 1] = str(devices)
        return given

    assert command("jaxgpt", *argv(tmp_path / "one", 1))[0] == 0
    out = tmp_path / "moved"
    for devices, mesh, until in ((4, "data=4", 10), (2, "fsdp=2", 20), (1, "data=1", None)):
        if until is None:
            code, _, err = command("jaxgpt", *argv(out, devices, "--mesh", mesh))
            assert code == 0
            assert "resuming after step" in err
            break
        process = start(*argv(out, devices, "--mesh", mesh))
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / str(until) / "_CHECKPOINT_METADATA").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
    one, moved = losses(tmp_path / "one"), losses(out)
    assert list(one) == list(moved)
    assert max(abs(one[step] - moved[step]) for step in one) <= 1e-5
