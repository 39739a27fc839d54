"""Ctrl-C and SIGTERM in a training, in real processes, one of them on a real terminal."""

import os
import pty
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import python
from test_jaxgpt_processes import free_port
from waiting import killed_at_end, killed_when_late, read_line, wait_until

from jaxgpt.training.devices.stop_signal import StopSignal
from jaxgpt.training.run.folder import read_metrics
from jaxgpt.training.run.summary import finished_steps

# A training whose steps sleep: it prints each, and at its end how it was stopped.
STEPS = """
import sys, time, jax
jax.config.update("jax_platforms", "cpu")
{join}
from jaxgpt.training.devices.stop_signal import StopSignal
with StopSignal() as stop:
    for step in range(1, 2000):
        print("step", step, flush=True)
        time.sleep({seconds})
        if stop.requested(step):
            print("stopped", step, stop.interrupted(), flush=True)
            break
"""


def start(join: str = "", seconds: float = 0.02) -> subprocess.Popen[str]:
    command, environment = python(STEPS.format(join=join, seconds=seconds))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    with killed_when_late(process, f"the line {line!r}"):
        while (found := process.stdout.readline().strip()) != line:
            assert found, process.communicate()[1]


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_stops_after_the_step(number: signal.Signals, interrupted: bool) -> None:
    process = start()
    with killed_at_end(process):
        wait_for(process, "step 2")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith(str(interrupted))
    assert ("Ctrl-C again leaves at once" in err) == interrupted


def test_what_the_shell_has_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert not stop.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert stop.requested(2)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        threads = threading.active_count()
        monkeypatch.setattr("jax.process_count", lambda: 2)  # SIGTERM is JAX's then
        with StopSignal():
            assert threading.active_count() == threads + 1
        assert threading.active_count() == threads
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    process = start(seconds=600)
    with killed_at_end(process):
        wait_for(process, "step 1")
        process.send_signal(signal.SIGINT)
        assert "saving after this step" in read_line(process, "what Ctrl-C does", process.stderr)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30  # a step takes 600 s
    assert (process.returncode, out) == (130, "")
    assert "the same command goes on from the last checkpoint" in err


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGINT, "True"), (signal.SIGTERM, "False")])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    number: signal.Signals, interrupted: str
) -> None:
    port = free_port()
    both = [start(f"jax.distributed.initialize('127.0.0.1:{port}', 2, {index})") for index in range(2)]
    with killed_at_end(*both):
        for process in both:
            wait_for(process, "step 2")
        both[1].send_signal(number)
        ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    first, second = (out.splitlines()[-1] for out, _ in ends)
    assert first == second
    assert first.startswith("stopped")
    assert first.endswith(interrupted)


def test_ctrl_c_on_a_terminal_saves_and_is_code_130(data: Path, tmp_path: Path) -> None:
    out, terminal = tmp_path / "run", pty.openpty()
    given = ("train", "tiny", "--data", data, "--out", out, "--n-layer", 1, "--n-embd", 16, "--n-head", 1)
    more = ("--block-size", 32, "--sample-every", 0, "--eval-every", 10**6, "--max-steps", 10**6)
    argv = [str(argument) for argument in (*given, *more, "--cpu-devices", 1)]
    command, environment = python(f"import sys; sys.argv = {['jaxgpt', *argv]!r}\n" + CONSOLE)
    process = subprocess.Popen(
        command, env={**environment, "TERM": "xterm"}, stdin=terminal[1], stdout=terminal[1],
        stderr=terminal[1], start_new_session=True,
    )  # fmt: skip
    os.close(terminal[1])

    def has_metrics() -> bool:
        assert process.poll() is None, os.read(terminal[0], 10**5)
        return bool(read_metrics(out))

    with killed_at_end(process):
        wait_until(has_metrics, "a step", every=0.05)
        os.write(terminal[0], b"\x03")
        with killed_when_late(process, "the end of the training"):
            shown = read_all(terminal[0])
        assert process.wait(timeout=60) == 130, shown
    assert "saving after this step" in shown
    assert "the same command goes on from there" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
    last = max(row["step"] for row in read_metrics(out))
    assert (out / "checkpoints" / str(last)).is_dir()
    assert finished_steps(out) is None


CONSOLE = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from jaxgpt.cli import main
sys.exit(main())
"""


def read_all(terminal: int) -> str:
    """Read what a terminal shows until the last program on it ends."""
    shown = b""
    while True:
        try:
            part = os.read(terminal, 10_000)
        except OSError:  # EIO, the end on Linux
            part = b""
        if not part:
            return shown.decode()
        shown += part
