"""The folder that processes share while they prepare a data set: .NAME.tmp-work beside the data set NAME.

    plan.json               what is asked for, and the units of the source
    PLAN/STAGE/00012.json   the summary of a task; there when the task is done, its other files before it
    PLAN/STAGE/00012.lock   locked by the process that does the task; holds the bytes that it has done
    PLAN/error.json         why everybody stops

PLAN is of plan.json's hash: a process that was left over from another plan finds its folder gone.

A task is claimed by a lock on its file, which ends with its process however that ends. Where a file system
does not lock between machines, or not at all, two may do the same task: they write the same bytes, and files
appear whole.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgpt.data.documents import Piece
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import new_file, read_json, write_json
from jaxgpt.shared.locks import take

PAUSE_S = 0.05  # between two looks at what others do
_TOLD_EVERY_S = 0.3

Advance = Callable[[int], None]


class StoppedError(Exception):
    """The work ended elsewhere: it failed, was broken off, or is done."""


class KeptError(UserError):
    """A worker was killed, or the system refused it something: the same command goes on from what is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Tasks that may be done in any order, by anyone.

    Attributes:
      name: of its folder.
      count: how many tasks there are, known when the stage before is done.
      run: does one; returns its summary, as JSON takes it.
      files: ends of the names of the files that it writes.
      size: bytes of text in a task, for the progress bar; None where it takes no time.
      title: what the bar says.
    """

    name: str
    count: Callable[["Work"], int]
    run: Callable[["Work", int, Advance], dict[str, Any]]
    files: tuple[str, ...] = ()
    size: Callable[["Work", int], int] | None = None
    title: str = ""


def place_of(folder: Path, plan: dict[str, Any]) -> Path:
    """Return the folder of a plan in a work folder."""
    return folder / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


class Work:
    """A work folder.

    Args:
      folder: holds plan.json.
      parent: the process without which this one ends; None for none.

    Attributes:
      plan: what is asked for; see plan.py.
      place: where files of this plan lie.
      threads: that this process may use for one task.
    """

    def __init__(self, folder: Path, parent: int | None = None) -> None:
        self.folder = folder
        self.plan = read_json(folder / "plan.json", "plan")
        self.place = place_of(folder, self.plan)
        self.threads = 1
        self._parent = parent
        self._locks = True  # what the folder's file system does, as far as known
        self._done: dict[tuple[str, int], dict[str, Any]] = {}

    @functools.cached_property
    def units(self) -> list[list[Piece]]:
        """The pieces of each unit."""
        return [[Piece(**piece) for piece in unit] for unit in self.plan["units"]]

    def path(self, stage: str, number: int, suffix: str) -> Path:
        """Return the file of a task."""
        return self.place / stage / f"{number:05d}{suffix}"

    def summary(self, stage: str, number: int) -> dict[str, Any]:
        """Return the summary of a task that is done."""
        if (stage, number) not in self._done:
            self._done[stage, number] = read_json(self.path(stage, number, ".json"), "summary")
        return self._done[stage, number]

    def summaries(self, stage: str) -> list[dict[str, Any]]:
        """Return the summaries of a stage that has a task a unit."""
        return [self.summary(stage, number) for number in range(len(self.units))]

    def is_done(self, stage: str, number: int) -> bool:
        """Whether a task is done."""
        return (stage, number) in self._done or self.path(stage, number, ".json").exists()

    def done_bytes(self, stage: Stage, number: int) -> int:
        """Return how many bytes of a task are done, as far as its process told."""
        if stage.size is None:
            return 0
        if self.is_done(stage.name, number):
            return stage.size(self, number)
        try:
            return int(self.path(stage.name, number, ".lock").read_text())
        except (OSError, ValueError):
            return 0

    @property
    def is_there(self) -> bool:
        """Whether the work was neither finished nor replaced by that of another plan."""
        return self.place.exists() and (self.folder / "plan.json").exists()

    def check(self) -> None:
        """Raise StoppedError where there is nothing more to do here."""
        orphaned = self._parent is not None and os.getppid() != self._parent
        if orphaned or (self.place / "error.json").exists() or not self.is_there:
            raise StoppedError

    @contextlib.contextmanager
    def claim(self, stage: str, number: int) -> Iterator[Advance | None]:
        """Claim a task; None where another process has it."""
        path = self.path(stage, number, ".lock")
        try:
            path.parent.mkdir(exist_ok=True)
        except FileNotFoundError:  # the folder of this plan is gone
            raise StoppedError from None
        with path.open("a+") as file:
            try:
                self._locks = take(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
            except BlockingIOError:
                yield None
                return
            yield self._advance(file.fileno())

    def _advance(self, descriptor: int) -> Advance:
        done, told = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(done).encode())
                self.check()

        return advance

    def work_through(self, stage: Stage) -> None:
        """Do the tasks of a stage that nobody else does, until all are done.

        Raises:
          StoppedError: the work ended elsewhere.
        """
        ahead = list(range(stage.count(self)))
        while ahead:
            before = len(ahead)
            ahead = [number for number in ahead if not self._do(stage, number)]
            if len(ahead) == before:
                self.check()
                time.sleep(PAUSE_S)

    def _do(self, stage: Stage, number: int) -> bool:
        """Do a task unless another process does; return whether it is done."""
        if self.is_done(stage.name, number):
            return True
        with self.claim(stage.name, number) as advance:
            if advance is None:
                return False
            if not self.is_done(stage.name, number):
                self.check()
                self._remove_leftovers(stage.name, number)
                summary = stage.run(self, number, advance)
                sizes = {end: self.path(stage.name, number, end).stat().st_size for end in stage.files}
                self._publish(self.path(stage.name, number, ".json"), {**summary, "sizes": sizes})
        return True

    def _remove_leftovers(self, stage: str, number: int) -> None:
        """Remove what a killed process had begun to write of a task that no other can do now."""
        for path in (self.place / stage).glob(f".{number:05}.*.tmp-*") if self._locks else ():
            path.unlink(missing_ok=True)

    def _publish(self, path: Path, summary: dict[str, Any]) -> None:
        """Let a summary appear whole; not forced to the disk, for that waits for all that was written."""
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")

    def forget_cut(self, stages: Iterable[Stage]) -> None:
        """Forget tasks whose files are shorter than they were: the machine stopped before they were kept."""
        for stage in stages:
            for path in (self.place / stage.name).glob("[0-9]*.json"):
                number = int(path.stem)
                try:
                    sizes = read_json(path, "summary")["sizes"]
                    whole = all(self.path(stage.name, number, e).stat().st_size == sizes[e] for e in sizes)
                except (OSError, UserError, LookupError, TypeError, AttributeError):
                    whole = False
                if not whole:
                    path.unlink()

    def fail(self, error: Exception, line: str | None) -> None:
        """Tell all others to stop; the first reason stays."""
        if self.is_there and not (self.place / "error.json").exists():
            module = error.name if isinstance(error, ModuleNotFoundError) else None
            kept = isinstance(error, OSError)
            found = {"line": line, "module": module, "error": repr(error), "kept": kept}
            write_json(self.place / "error.json", found)

    def raise_failure(self) -> None:
        """Raise what made a worker stop, if one did."""
        path = self.place / "error.json"
        if not path.exists():
            return
        found = read_json(path, "error")
        if found.get("kept"):
            raise KeptError(f"{found['line']}; what is done is kept in {self.folder}")
        if found["line"] is not None:
            raise UserError(found["line"])
        if found["module"] is not None:
            raise ModuleNotFoundError(found["error"], name=found["module"])
        raise RuntimeError(f"a worker failed: {found['error']}")
