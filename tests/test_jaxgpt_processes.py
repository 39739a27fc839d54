"""Several processes on this machine, joined as several hosts would be."""

import shutil
import socket
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, python
from waiting import killed_at_end

from jaxgpt.shared.errors import UserError
from jaxgpt.training.devices.processes import CommonError, ending_the_others, join_processes
from jaxgpt.training.run.folder import read_metrics

FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5
SLOW = ("--learning-rate", 1e-3, "--embedding-learning-rate", 1e-3)
SMALL = ("--n-layer", 1, "--mesh", "data=2,fsdp=2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_both(codes: list[str], timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run a program a process, both at a time."""
    started = []
    for code in codes:
        command, environment = python(code)
        environment["PYTHONPATH"] += ":" + str(Path(__file__).parent)
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    done = []
    with killed_at_end(*started):
        for process in started:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


STEPS_CODE = """
import jax, json
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("127.0.0.1:{port}", 2, {index})
import os; os.environ["JAXGPT_TEST_CHILD"] = "1"
import jax.numpy as jnp
from test_jaxgpt_steps import losses
with jax.enable_x64(True):
    double = [list(losses(2, mesh, jnp.float64)) for mesh in ("data=4", "data=2,fsdp=2")]
single = [list(losses(2, "data=2,fsdp=2", jnp.float32))]
print(json.dumps([double, single]))
"""


@pytest.mark.slow
def test_fifty_steps_lose_the_same_in_two_processes_of_two_devices() -> None:
    import json

    from test_jaxgpt_steps import losses

    port = free_port()
    done = run_both([STEPS_CODE.format(port=port, index=index) for index in range(2)])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    first, second = (json.loads(process.stdout.splitlines()[-1]) for process in done)
    assert first == second
    with jax.enable_x64(True):
        one = losses(1, "", jnp.float64)
    assert np.abs(np.array(first[0]) - one).max() <= FLOAT64_TOLERANCE
    assert np.abs(np.array(first[1]) - losses(1, "", jnp.float32)).max() <= FLOAT32_TOLERANCE


def train_code(data: Path, out: Path, port: int, index: int, *more: object) -> str:
    given = ("train", "tiny", "--data", data, "--out", out, "--cpu-devices", 2, *TINY_SHAPE, *TINY_TRAIN)
    joined = ("--coordinator", f"127.0.0.1:{port}", "--process-count", 2, "--process-index", index)
    argv = [str(argument) for argument in (*given, *SLOW, *joined, *more)]
    return f"import sys; from jaxgpt.cli import main; sys.exit(main({argv!r}))"


def test_two_processes_train_one_run_that_one_process_could_have_trained(
    command: Command, data: Path, tmp_path: Path
) -> None:
    """Sharded state, checkpoints, validation and samples; then the same command has nothing left to do."""
    out = tmp_path / "two"
    for attempt in range(2):
        port = free_port()
        done = run_both([train_code(data, out, port, i, *SMALL) for i in range(2)])
        assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
        assert ("nothing left to do" in done[0].stderr) == (attempt == 1)
    given = ("--cpu-devices", 4, *TINY_SHAPE, *TINY_TRAIN, *SLOW, "--n-layer", 1)
    assert command("jaxgpt", "train", "tiny", "--data", data, "--out", tmp_path / "one", *given)[0] == 0
    one, two = (
        [row.get("loss", row.get("val_loss")) for row in read_metrics(tmp_path / name)]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 42
    assert np.abs(np.array(one) - np.array(two)).max() <= FLOAT32_TOLERANCE
    assert (out / "samples" / "step_00000040.txt").read_text()
    assert command("jaxgpt", "evaluate", "--run", out)[0] == 0
    for path in (out / "checkpoints" / "40" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-9])
    port = free_port()
    done = run_both([train_code(data, out, port, i, *SMALL) for i in range(2)])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "checkpoint 40 is moved" in done[0].stderr  # which no process could read
    assert "resuming after step 20" in done[0].stderr


def test_what_process_0_refuses_ends_both_with_code_2(run: Path, data: Path, tmp_path: Path) -> None:
    port, own = free_port(), shutil.copytree(run, tmp_path / "run")  # another worker may train on the first
    done = run_both([train_code(data, own, port, index, "--seed", 5) for index in range(2)])
    assert [process.returncode for process in done] == [2, 2], done[0].stderr + done[1].stderr
    assert "train.seed was 0, now 5" in done[0].stderr
    assert "process 0 stopped" in done[1].stderr


class LeftError(Exception):
    """The process would have ended."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (UserError("shard 3 is damaged"), "shard 3 is damaged"),
        (FileNotFoundError(2, "No such file or directory", "here"), "here: No such file or directory; check"),
    ],
)
def test_whatever_fails_in_one_of_several_processes_ends_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    """In order it would wait for the others, and they for it. Alone, it is raised as it is."""

    def leave(text: str, code: int) -> None:
        raise LeftError(text, code)

    monkeypatch.setattr("jaxgpt.training.devices.processes.leave", leave)
    with pytest.raises(type(error)), ending_the_others():
        raise error
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LeftError) as left, ending_the_others():
        raise error
    text, code = left.value.args
    assert text.startswith(f"error: {line}")
    assert text.endswith("; the other processes end too")
    assert code == 2
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
    with pytest.raises(CommonError), ending_the_others():  # all processes raise it
        raise CommonError("process 0 stopped")


def test_a_start_by_hand_inside_a_slurm_job_asks_slurm_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX would take one device a process from there."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: asked.append(given))
    join_processes("127.0.0.1:8476", 2, 0, found_by_jax=False, timeout_s=5)
    join_processes(None, None, None, found_by_jax=True, timeout_s=5)
    assert [given["cluster_detection_method"] for given in asked] == ["deactivate", None]


def test_unreachable_coordinator_is_one_line_within_the_timeout(data: Path, tmp_path: Path) -> None:
    code = train_code(data, tmp_path / "r", free_port(), 1, "--join-timeout", 2)
    (done,) = run_both([code], timeout=60)
    assert_one_line_error((done.returncode, done.stdout, done.stderr), "can't be reached within 2 s")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--process-count", 2), "--coordinator HOST:PORT, --process-count N and --process-index I together"),
        (("--coordinator", "here", "--process-count", 2, "--process-index", 0), "no HOST:PORT"),
        (("--coordinator", "a:1", "--process-count", 2, "--process-index", 2), "[0, 2)"),
        (("--distributed", "--process-count", 2), "give it alone"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    command: Command, data: Path, tmp_path: Path, more: tuple[object, ...], part: str
) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", data, "--out", tmp_path / "r", *more)
    assert_one_line_error(result, part)
    assert not (tmp_path / "r").exists()
