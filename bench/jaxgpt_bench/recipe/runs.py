"""Runs of `jaxgpt-bench recipe`: what one is, and a pool of processes that takes them."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jaxgpt.shared.config import TrainConfig
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData

DEFAULTS = TrainConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(JsonData):
    """One training.

    Attributes:
      row: name of the table's row.
      shape: name of the model's shape.
      steps: of the training, on which its schedule depends.
      seed: of initialization and data order.
      settings: of TrainConfig, beside steps and seed.
      average_last: share of the steps whose weights are averaged at the end; 0 for the last weights.
      newton_schulz: precision of Muon's products alone.
    """

    row: str
    shape: str
    steps: int
    seed: int
    settings: dict[str, Any]
    average_last: float = 0.0
    newton_schulz: str = "fp32"

    @property
    def key(self) -> str:
        """What makes it the same training, whatever its row is called; defaults may be said or not."""
        told = {
            name: value for name, value in self.settings.items() if value != getattr(DEFAULTS, name, None)
        }
        return json.dumps({**self.to_json(), "row": None, "settings": told}, sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(JsonData):
    """A training that is done.

    Attributes:
      run: which.
      val_loss: nats per token, over the whole validation split; None where it is no number.
      val_bits_per_byte: the same per byte.
      cpu_seconds: of all steps, without compiling and validation.
      date: when it was done; this and the following are None in files of earlier versions.
      commit: that trained.
      cpu: on which.
    """

    run: Run
    val_loss: float | None
    val_bits_per_byte: float | None
    cpu_seconds: float
    date: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    commit: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    cpu: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)


def take(
    runs: Iterable[Run], shape: Mapping[str, int], data: Path, jobs: int, keep: Callable[[Outcome], None]
) -> None:
    """Take runs in processes of one thread each; `keep` is called after each, one at a time.

    Ctrl-C ends the processes.

    Raises:
      UserError: a process failed; those begun before are finished.
    """
    running: set[subprocess.Popen[str]] = set()
    cores = sorted(os.sched_getaffinity(0))
    free: SimpleQueue[int] = SimpleQueue()
    for job in range(jobs):
        free.put(cores[job % len(cores)])

    def one(run: Run) -> Outcome:
        core = free.get()
        try:
            return _in_process(run, shape, data, core, running)
        finally:
            free.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, run) for run in runs]
        try:
            for each in waiting:
                keep(each.result())
        except BaseException as error:
            for each in waiting:
                each.cancel()
            if isinstance(error, KeyboardInterrupt):
                for process in tuple(running):
                    process.kill()
            raise


def _in_process(
    run: Run, shape: Mapping[str, int], data: Path, core: int, running: set[subprocess.Popen[str]]
) -> Outcome:
    """Take a run in a process, which is among those that are `running` until it ends."""
    order = {"run": run.to_json(), "shape": dict(shape), "data": str(data), "core": core}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "jaxgpt_bench.recipe.training_process", json.dumps(order)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C on a terminal goes to the command alone, which ends the others
    ) as process:
        running.add(process)
        answer, _ = process.communicate()
    running.discard(process)
    if process.returncode:
        raise UserError(f"a training of {run.row} left with code {process.returncode}; its message is above")
    return Outcome.from_json(json.loads(answer))


def missing(wanted: Sequence[Run], done: Iterable[Outcome]) -> list[Run]:
    """Return what is wanted and not done, each training once."""
    known = {outcome.run.key for outcome in done}
    found: dict[str, Run] = {}
    for run in wanted:
        if run.key not in known:
            found.setdefault(run.key, run)
    return list(found.values())
