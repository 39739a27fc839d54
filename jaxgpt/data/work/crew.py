"""Processes that work through the stages of a preparation, and a progress bar over bytes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

import jaxgpt
from jaxgpt.data.work.plan import parts_expected
from jaxgpt.data.work.work_folder import PAUSE_S, KeptError, Stage, Work
from jaxgpt.shared.console import stderr
from jaxgpt.shared.errors import UserError

WORKER = "jaxgpt.data.stages.worker"
REFUSED = 2  # exit code of a worker that could write nothing, not even why
_SHOWN_EVERY_S = 0.25


class Crew:
    """Worker processes, or this process alone where there is one part or one worker.

    Args:
      work: what they work on.
      workers: at least 1; one part is encoded by as many threads.
      joins: whether other processes began the work; what goes wrong here does not stop them.
    """

    def __init__(self, work: Work, workers: int, joins: bool = False) -> None:
        self._work, self._workers, self._joins = work, workers, joins
        self._count = min(workers, parts_expected(work))
        self._folder = work.plan["folder"] or os.getcwd()
        self._is_alone = self._count == 1 and self._folder == os.getcwd()
        if self._is_alone:
            work.threads = workers
        if not Path(self._folder).is_dir():
            raise UserError(f"the source is told from {self._folder}, which is not there; mount it here too")
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Crew":
        if not self._is_alone:
            root = str(Path(jaxgpt.__file__).resolve().parents[1])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            line = [
                sys.executable,
                "-P",  # nothing of the folder that the source is named from is imported
                "-m",
                WORKER,
                str(self._work.folder),
                str(os.getpid()),
                str(self._workers),
            ]
            line += ["joins"] if self._joins else []
            self._processes = [
                subprocess.Popen(line, env=environment, cwd=self._folder) for _ in range(self._count)
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()

    def complete(self, stage: Stage) -> None:
        """Return when a stage is done.

        Raises:
          UserError: a task can't be done.
          KeptError: a worker was killed, or the system refused it something, such as room on a disk.
        """
        with _Bar(self._work, stage):
            if self._processes:
                self._wait_for(stage)
            else:
                self._work.work_through(stage)

    def _wait_for(self, stage: Stage) -> None:
        ahead = list(range(stage.count(self._work)))
        while ahead := [number for number in ahead if not self._work.is_done(stage.name, number)]:
            self._work.raise_failure()
            self._work.check()
            for process in self._processes:
                if process.poll() == REFUSED:
                    raise KeptError(
                        f"a worker stopped, as it says above; what is done is kept in {self._work.folder}: "
                        "free some space and run the same command again"
                    )
                if process.poll() not in (None, 0):
                    raise KeptError(
                        f"a worker process ended with code {process.returncode} (a negative one: it was "
                        "killed, perhaps for want of memory); what is done is kept: run the same command "
                        "again, with fewer --workers"
                    )
            time.sleep(PAUSE_S)


class _Bar:
    """Shows the bytes of a stage that all processes have done, while the block lasts, on a terminal."""

    def __init__(self, work: Work, stage: Stage) -> None:
        self._work, self._stage = work, stage
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> None:
        if self._stage.size is not None and stderr.is_terminal:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _show(self) -> None:
        assert self._stage.size is not None
        tasks = range(self._stage.count(self._work))
        sizes = [self._stage.size(self._work, number) for number in tasks]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task(self._stage.title, total=sum(sizes))
            while not self._ended.wait(_SHOWN_EVERY_S):
                done = sum(self._work.done_bytes(self._stage, number) for number in tasks)
                progress.update(task, completed=done)
