"""What an experiment's calls have taken so far, and how long the call under way may take.

OUT/calls.json lists the calls: when each began and ended, and the seconds of its stages. A call that was
killed has no end; it is taken to have ended when the last file of the folder was written.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_json

CALLS = "calls.json"
REPEATED_S = 1.0  # between two signals to a training that was told to stop


class Clock:
    """The time of an experiment; a context that notes the end of the call.

    Args:
      out: the folder of everything, which exists.
      budget_s: seconds that this call may take, from the start of its process; None for as many as it needs.
      began: when this process began, seconds since 1970; asked of the system if not given.

    Attributes:
      budget_s: as given.
      worked: whether this call has done anything yet.
    """

    def __init__(self, out: Path, budget_s: float | None, began: float | None = None) -> None:
        self._path, self.budget_s, self.worked = out / CALLS, budget_s, False
        self._began = process_start() if began is None else began
        calls = _read_calls(self._path)
        for call in calls:
            if call.get("ended") is None:
                call["ended"] = max(min(_last_written(out), self._began), call["began"])
        self._earlier_s = sum(call["ended"] - call["began"] for call in calls)
        self._call: dict[str, Any] = {"began": self._began, "ended": None, "stages": []}
        self._calls = [*calls, self._call]
        write_json(self._path, {"calls": self._calls})

    def __enter__(self) -> "Clock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call["ended"] = time.time()
        write_json(self._path, {"calls": self._calls})

    def spent_s(self) -> float:
        """Return the seconds of all calls, this one up to now."""
        return self._earlier_s + time.time() - self._began

    def left_s(self) -> float:
        """Return the seconds that this call has left; infinity without a budget."""
        return float("inf") if self.budget_s is None else self._began + self.budget_s - time.time()

    def note(self, stage: str, seconds: float) -> None:
        """Write down what a stage took in this call, whether it came to its end or not."""
        self.worked = True
        self._call["stages"].append({"stage": stage, "seconds": round(seconds, 1)})
        write_json(self._path, {"calls": self._calls})

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage over all calls; what a killed call was in is not known."""
        total: dict[str, float] = {}
        for call in self._calls:
            for entry in call["stages"]:
                total[entry["stage"]] = round(total.get(entry["stage"], 0.0) + entry["seconds"], 1)
        return total

    @contextlib.contextmanager
    def stopping_training(self, saving_s: float) -> Iterator[None]:
        """Let a training in this block save and leave so many seconds before the call's time is over.

        It is told as by a scheduler, with SIGTERM, again and again until it has left: before it listens the
        signal counts for nothing.
        """
        if self.budget_s is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        done = threading.Event()

        def watch() -> None:
            done.wait(max(self.left_s() - saving_s, 0.0))
            while not done.wait(REPEATED_S):
                os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, lambda *_: None)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            signal.signal(signal.SIGTERM, before)


def process_start() -> float:
    """Return when this process began, seconds since 1970: imports count as time of the call."""
    import psutil

    return float(psutil.Process().create_time())


def _read_calls(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        calls = read_json(path, "record of calls")["calls"]
        return [{**call, "began": float(call["began"]), "stages": list(call["stages"])} for call in calls]
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it: the time of earlier calls then counts for nothing"
        ) from None


def _last_written(folder: Path) -> float:
    """Return when the last file below a folder was written, seconds since 1970."""
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def clock_text(seconds: float) -> str:
    """Return such as "24.6 minutes"."""
    return f"{seconds / 60:.1f} minutes"
