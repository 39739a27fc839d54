"""Whose turn it is: the trainers' processes, as many alive at a time as a GPU's memory holds.

A process on a GPU keeps what it once took. Where all do not fit, the one that was asked last makes room for
the next, and is started again for its next turn. What it compiled is kept in files, so that it need not
compile again.
"""

import dataclasses
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.training.trainer import Trainer, environment

WARMUP_STEPS = 3
SPARE = 1.15  # of what a process is expected to take, that must be free for it
LACKS_MEMORY = re.compile(r"(?i)memory|RESOURCE_EXHAUSTED|ALLOC_FAILED|initialization failed")

Answer = dict[str, Any]  # of a trainer's process


class Turns:
    """The processes of the trainers.

    Args:
      threads: of the CPU.
      caches: folder for what they compile.

    Attributes:
      left_out: trainers that stopped, with why.
    """

    def __init__(self, threads: int, caches: Path) -> None:
        self._threads, self._caches = threads, caches
        self._alive: dict[str, Worker] = {}  # the one that was asked last is the last
        self._taken: dict[str, float] = {}  # bytes of the GPU, by the trainer's name and by its engine
        self.left_out: dict[str, str] = {}

    def warm_up(self, trainer: Trainer) -> Answer | None:
        """Start a trainer and take its first steps.

        Returns:
          Their answer, with startup_s; None where it stopped.
        """
        try:
            return self._start(trainer)
        except RuntimeError as error:
            self._leave_out(trainer, error)
            return None

    def ask(self, trainer: Trainer, *questions: dict[str, int]) -> list[Answer] | None:
        """Let a trainer answer questions in one turn; None where it stopped."""
        try:
            if trainer.name not in self._alive:
                self._start(trainer)
            worker = self._alive[trainer.name] = self._alive.pop(trainer.name)
            return [worker.ask(question) for question in questions]
        except RuntimeError as error:
            self._leave_out(trainer, error)
            return None

    def close(self) -> None:
        """End every process."""
        for name in list(self._alive):
            self._end(name)

    def _start(self, trainer: Trainer) -> Answer:
        """Start a process where there is room for it; where it finds too little, once more without others."""
        free = self._make_room(trainer)
        try:
            answer = self._start_here(trainer)
        except RuntimeError as error:
            if free is None or not self._alive or not LACKS_MEMORY.search(str(error)):
                raise
            say(f"{trainer.name} finds too little memory beside the others, which make room for it")
            self.close()
            free = self._make_room(trainer)
            answer = self._start_here(trainer)
        after = free_gpu_bytes() if free is not None else None
        if free is not None and after is not None:
            self._taken[trainer.name] = self._taken[trainer.engine] = free - after
        return answer

    def _make_room(self, trainer: Trainer) -> float | None:
        """End processes until a trainer fits; return what is free then, None where that does not matter."""
        free = free_gpu_bytes() if trainer.platform == "gpu" else None
        largest = max(self._taken.values(), default=0.0)
        expected = self._taken.get(trainer.name, self._taken.get(trainer.engine, largest))
        while free is not None and self._alive and free < SPARE * expected:
            self._end(list(self._alive)[-1])
            free = free_gpu_bytes()
        return free

    def _start_here(self, trainer: Trainer) -> Answer:
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
        self._alive[trainer.name] = worker
        return {**rest, "losses": [*first["losses"], *rest["losses"]], "startup_s": startup_s}

    def _end(self, name: str) -> None:
        worker = self._alive.pop(name, None)
        if worker is not None:
            worker.close()

    def _leave_out(self, trainer: Trainer, error: Exception) -> None:
        self.left_out[trainer.name] = str(error).removeprefix(f"{trainer.name} ")
        say(f"{trainer.name} is left out: it {self.left_out[trainer.name]}")
        self._end(trainer.name)


def free_gpu_bytes() -> float | None:
    """Return what is free on the first GPU that this process sees; None where that is not known."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if first := os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]:
        query.append(f"--id={first}")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return float(found.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
