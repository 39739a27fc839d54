"""Waits with a limit: what does not come in time fails its test, with what was awaited."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

SECONDS = 240  # for what takes a few on a quiet machine


def wait_until(true: Callable[[], object], what: str, seconds: float = SECONDS, every: float = 0.01) -> None:
    """Wait until something holds, looking every so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} did not come in {seconds} s"
        time.sleep(every)


def join(*threads: threading.Thread, seconds: float = SECONDS) -> None:
    """Wait for threads to end; they are to be daemons, or the interpreter would wait for one that hangs."""
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0.0))
        assert not thread.is_alive(), f"{thread.name} did not end in {seconds} s"


@contextlib.contextmanager
def killed_when_late(process: subprocess.Popen[Any], what: str, seconds: float = SECONDS) -> Iterator[None]:
    """Kill a process whose output is awaited for longer: the pipe's end then wakes whoever reads it."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as error:
        if late.is_set():
            raise AssertionError(f"{what} did not come in {seconds} s") from error
        raise
    finally:
        timer.cancel()
    assert not late.is_set(), f"{what} did not come in {seconds} s"


def read_line(
    process: subprocess.Popen[Any], what: str, stream: IO[Any] | None = None, seconds: float = SECONDS
) -> Any:
    """The next line that a process writes, to its stdout if no stream is given."""
    with killed_when_late(process, what, seconds):
        line = (stream or process.stdout).readline()  # type: ignore[union-attr]
        assert line, f"{what} did not come: the process left with {process.wait()}"
    return line


@contextlib.contextmanager
def killed_at_end(*processes: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave none of these running, whatever happened."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)  # closes its pipes and waits for it
            stack.callback(process.kill)  # before that
        yield
