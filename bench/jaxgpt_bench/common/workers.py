"""Processes that are measured: each answers a line of JSON with a line of JSON.

A process of its own gives each contestant its own threads and an honest peak of memory.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LONGEST_ERROR = 300  # characters of an error that are handed on
ANSWER_S = 3600.0  # for the longest: compiling with everything tried
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
ENDING_S = 60.0  # in which a process ends that said that it stopped
# glibc's malloc then asks for huge pages (madvise): reading is faster in them. Every program gets them.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STOPPED = "stopped"  # the key of a last answer; others may hold an error of their own


class Worker:
    """A contestant in a process of its own; it is ready when this returns.

    Args:
      name: for messages.
      module: run with `python -m`; its main part calls serve().
      order: what the process is to be, as JSON.
      environment: variables beside those of this process.

    Raises:
      RuntimeError: it stopped, here or while it was asked; the message says why, where that is known.
    """

    def __init__(
        self, name: str, module: str, order: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            process_group=0,  # Ctrl-C on a terminal goes to this process alone, which ends the others
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer."""
        assert self._process.stdin is not None
        # A process that has stopped reads no question; what it said last tells why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            self.close()
            raise RuntimeError(f"{self.name} did not answer within {ANSWER_S / 60:.0f} minutes")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"{self.name} stopped with code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if STOPPED in answer:
            try:
                self._process.wait(timeout=ENDING_S)
            except subprocess.TimeoutExpired:
                self.close()
            code = self._process.returncode
            raise RuntimeError(f"{self.name} stopped with code {code}: {answer[STOPPED]}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve(prepare: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Be a worker: prepare from the order in argv, then answer each line of stdin.

    Args:
      prepare: takes the order, returns what answers a question.
    """
    if sys.platform == "linux":  # it ends with its parent, be that killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        answer = prepare(json.loads(sys.argv[1]))
        send({"ready": True})
        for line in sys.stdin:
            send({**answer(json.loads(line)), "peak_rss_bytes": peak_rss_bytes()})
    except Exception as error:
        send({STOPPED: f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_ERROR]}"})
        raise


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far (getrusage would count the parent's)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
