"""A command with its children: wall and cpu time, and the most memory that all of them had at a time."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from jaxgpt.shared.errors import UserError

SAMPLED_EVERY_S = 0.2


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
      seconds: from its start to its end.
      cpu_seconds: of it and its children, user and system.
      peak_memory_bytes: proportional set size (shared pages are counted once) of all of them together.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


def measured(line: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Run a command to its end.

    Raises:
      UserError: it failed; with the last line that it said.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = _Peak(process.pid)
    peak.start()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    peak.ended.set()
    peak.join()
    if process.returncode:
        last = said[-1].strip() if said else "nothing was said"
        raise UserError(f"{' '.join(line[:6])} ... ended with code {process.returncode}: {last}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak.bytes)


class _Peak(threading.Thread):
    """Watches the memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.bytes = 0
        self._pid = pid

    def run(self) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self._pid)
            while not self.ended.wait(SAMPLED_EVERY_S):
                total = 0
                for process in (first, *first.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss
                self.bytes = max(self.bytes, total)
