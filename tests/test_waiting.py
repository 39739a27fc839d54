"""The limits of waits trip, and leave no process behind."""

import subprocess
import sys
import threading

import pytest
from waiting import join, killed_at_end, read_line, wait_until

SLEEPS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def test_a_line_that_does_not_come_fails_with_what_was_awaited_and_ends_the_process() -> None:
    process = subprocess.Popen(SLEEPS, stdout=subprocess.PIPE, text=True)
    with killed_at_end(process):
        assert read_line(process, "the first line") == "up\n"
        with pytest.raises(AssertionError, match=r"^the second line did not come in 0\.1 s"):
            read_line(process, "the second line", seconds=0.1)
        assert process.wait(timeout=60) == -9


def test_a_process_that_leaves_before_its_line_is_said_to_have_left() -> None:
    process = subprocess.Popen([sys.executable, "-c", "exit(3)"], stdout=subprocess.PIPE, text=True)
    with killed_at_end(process), pytest.raises(AssertionError, match="the process left with 3"):
        read_line(process, "a line")


def test_processes_end_whatever_fails_beside_them() -> None:
    both = [subprocess.Popen(SLEEPS, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with pytest.raises(KeyError), killed_at_end(*both):
        raise KeyError
    assert [process.returncode for process in both] == [-9, -9]


def test_what_does_not_come_true_and_threads_that_do_not_end_fail() -> None:
    with pytest.raises(AssertionError, match=r"^the end of days did not come in 0\.05 s"):
        wait_until(lambda: False, "the end of days", seconds=0.05)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="it", daemon=True)
    thread.start()
    with pytest.raises(AssertionError, match=r"^it did not end in 0\.05 s"):
        join(thread, seconds=0.05)
    end.set()
    join(thread)
