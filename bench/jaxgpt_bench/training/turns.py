"""Whose turn it is: the trainers' processes, alive together where a GPU's memory holds them all.

A process on a GPU keeps what it once took. Where all do not fit, each is started for its turn alone and
ended after it; what it compiled is kept in files, so that it need not compile again.
"""

import dataclasses
import subprocess
import time
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.training.trainer import Trainer, environment

WARMUP_STEPS = 3
SPARE = 1.15  # of what the largest process took, that must be free for another one

Answer = dict[str, Any]  # of a trainer's process


class Turns:
    """The processes of the trainers.

    Args:
      threads: of the CPU.
      caches: folder for what they compile.
    """

    def __init__(self, threads: int, caches: Path) -> None:
        self._threads, self._caches = threads, caches
        self._workers: dict[str, Worker] = {}
        self._largest = 0.0  # bytes that a process took of a GPU
        self.together = True
        self.left_out: dict[str, str] = {}

    def warm_up(self, trainer: Trainer) -> Answer | None:
        """Start a trainer and take its first steps.

        Returns:
          Their answer, with startup_s; None where it stopped, which left_out explains.
        """
        free = free_gpu_bytes() if trainer.platform == "gpu" else None
        if self._workers and free is not None and free < SPARE * self._largest:
            self._part(f"{free / 1e9:.0f} GB are free and a trainer takes up to {self._largest / 1e9:.0f}")
        try:
            answer = self._start(trainer)
        except RuntimeError as error:
            if not self._workers or trainer.platform != "gpu":
                self._leave_out(trainer, error)
                return None
            self._part("beside the others it found no memory, perhaps")
            try:
                answer = self._start(trainer)
            except RuntimeError as again:
                self._leave_out(trainer, again)
                return None
        after = free_gpu_bytes() if trainer.platform == "gpu" else None
        if free is not None and after is not None:
            self._largest = max(self._largest, free - after)
        if not self.together:
            self._end(trainer)
        return answer

    def ask(self, trainer: Trainer, *questions: dict[str, int]) -> list[Answer] | None:
        """Let a trainer answer questions in one turn; None where it stopped, which left_out explains."""
        try:
            if trainer.name not in self._workers:
                self._start(trainer)
            return [self._workers[trainer.name].ask(question) for question in questions]
        except (RuntimeError, BrokenPipeError) as error:
            self._leave_out(trainer, error)
            return None
        finally:
            if not self.together:
                self._end(trainer)

    def close(self) -> None:
        """End every process."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}

    def _start(self, trainer: Trainer) -> Answer:
        started = time.perf_counter()
        variables = environment(trainer, self._threads, self._caches)
        worker = Worker(trainer.name, trainer.module, dataclasses.asdict(trainer), variables)
        try:
            first = worker.ask({"steps": 1})
            startup_s = time.perf_counter() - started
            rest = worker.ask({"steps": WARMUP_STEPS - 1})
        except BaseException:
            worker.close()
            raise
        self._workers[trainer.name] = worker
        return {**rest, "losses": [*first["losses"], *rest["losses"]], "startup_s": startup_s}

    def _part(self, reason: str) -> None:
        """Let each process live in its turn only."""
        say(f"one trainer at a time from here on, started anew for each turn: {reason}")
        self.close()
        self.together = False

    def _end(self, trainer: Trainer) -> None:
        worker = self._workers.pop(trainer.name, None)
        if worker is not None:
            worker.close()

    def _leave_out(self, trainer: Trainer, error: Exception) -> None:
        self.left_out[trainer.name] = str(error).removeprefix(f"{trainer.name} ")
        say(f"{trainer.name} is left out: it {self.left_out[trainer.name]}")
        self._end(trainer)


def free_gpu_bytes() -> float | None:
    """Return what is free on the first GPU that this process sees; None where that is not known."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return float(found.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
