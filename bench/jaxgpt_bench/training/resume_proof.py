"""`jaxgpt-bench resume-proof`: kills a training again and again and shows that nothing of it is lost.

    jaxgpt-bench resume-proof --data data/stdlib --out runs/proof --kills 20

A small training is run once undisturbed, and once killed (SIGKILL) at random moments and started again by
the same command; a part of the kills falls inside saves, and half of them on a training in two
processes. Every loss of the killed training must be the same bits as the undisturbed one's, and the
last checkpoint must have the same checksum.
"""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_output_folder, prepare_output_file, write_json
from jaxgpt_bench.common.provenance import provenance

SHAPE = ("--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--dropout", "0.1")
STEPS_A_KILL = 150  # the training is long enough that all kills fall into it
SAVE_EVERY = 40  # some kills fall between saves
TIMEOUT_S, STEPS_IN_TIMEOUT = 300.0, 1650  # of twenty kills in two parts
POLL_S = 0.001


@dataclasses.dataclass(frozen=True)
class ResumeProofOptions:
    """Kill a small training at random moments and compare it with an undisturbed one, bit for bit.

    Attributes:
      data: dataset folder.
      out: a new folder for the runs.
      kills: how many, half of them with two processes.
      seed: of the random moments.
      result: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    data: Path
    out: Path
    kills: int = 20
    seed: int = 0
    result: Path | None = None
    json: bool = False


class Training:
    """A training command, started in one process or in two.

    Args:
      data: dataset folder.
      run: run folder.
      processes: 1 (with two devices) or 2 (with one device each).
      steps: optimizer steps.
    """

    def __init__(self, data: Path, run: Path, processes: int, steps: int) -> None:
        self.run, self.processes, self.steps = run, processes, steps
        settings = ("--max-steps", steps, "--checkpoint-every", SAVE_EVERY, "--eval-every", steps // 4)
        given = ("--data", data, "--out", run, "--sample-every", 0, "--cpu-devices", 2 // processes)
        options = (*given, *settings, "--deterministic")
        self._arguments = [*SHAPE, *(str(option) for option in options)]
        self._running: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Start every process."""
        joined: list[list[str]] = [[]]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                coordinator = f"127.0.0.1:{free.getsockname()[1]}"
            count = str(self.processes)
            joined = [
                ["--coordinator", coordinator, "--process-count", count, "--process-index", str(index)]
                for index in range(self.processes)
            ]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._running = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxgpt", "train", "tiny", *self._arguments, *flags],
                stdout=subprocess.DEVNULL,  # Gloo talks there
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for flags in joined
        ]

    def kill(self) -> None:
        """Send SIGKILL to every process that runs."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
          UserError: a process failed, and its last line tells why; or it took too long.
        """
        limit = TIMEOUT_S * max(1.0, self.steps / STEPS_IN_TIMEOUT)
        for process in self._running:
            try:
                _, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise UserError(
                    f"training in {self.run} took longer than {limit:.0f} s; give fewer --kills, or a "
                    "machine that does less beside"
                ) from None
            if process.returncode:
                last = (err.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"training in {self.run} left with code {process.returncode}: {last}")

    def ended(self) -> bool:
        """Whether a process has ended by itself."""
        return any(process.poll() is not None for process in self._running)

    def step(self) -> int:
        """Return the last step written down."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes()[-1000:].splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written, or a killed one lies there."""
        return any((self.run / "checkpoints").glob("*orbax-checkpoint-tmp*"))

    def rows(self) -> dict[tuple[int, str], float]:
        """Return every recorded loss by step and kind."""
        from jaxgpt.training.run.folder import read_metrics  # imports JAX

        return {
            (row["step"], name): row[name]
            for row in read_metrics(self.run)
            for name in ("loss", "grad_norm", "val_loss")
            if name in row
        }

    def last_checksum(self) -> int:
        """Return the checksum of all bits of the last checkpoint, as it was saved."""
        path = self.run / "checkpoints" / str(self.steps) / "position" / "metadata"
        return int(json.loads(path.read_text(encoding="utf-8"))["checksum"])


def resume_proof(options: ResumeProofOptions) -> Result:
    """Run `jaxgpt-bench resume-proof`; exit code 1 when a loss differs."""
    if options.kills < 2:
        raise UserError(f"kills ({options.kills}) must be at least 2")
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out} is not empty; choose another --out")
    check_output_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_output_file(options.result, "--result")
    moments = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    finals: list[bool] = []
    for processes in (1, 2):
        count = options.kills // 2 + (options.kills % 2 if processes == 1 else 0)
        found, final = prove(options, processes, count, moments)
        kills += found
        finals.append(final)
    equal = sum(kill["equal"] for kill in kills)
    figures = {
        **provenance().to_json(),
        "kills": kills,
        "equal": equal,
        "inside_saves": sum(kill["inside_save"] for kill in kills),
        "two_processes": sum(kill["processes"] == 2 for kill in kills),
        "final_checkpoints_equal": finals,
    }
    say(
        f"{equal} of {len(kills)} kills: bitwise equal afterwards ({figures['inside_saves']} inside saves, "
        f"{figures['two_processes']} with two processes); last checkpoints equal: {all(finals)}"
    )
    if options.result is not None:
        write_json(options.result, figures)
    return Result(figures, passed=equal == len(kills) and all(finals))


def prove(
    options: ResumeProofOptions, processes: int, count: int, moments: random.Random
) -> tuple[list[dict[str, Any]], bool]:
    """Train undisturbed, then with kills, in so many processes.

    Returns:
      A record a kill, and whether the last checkpoints have the same checksum.
    """
    steps = STEPS_A_KILL * (count + 1)
    data = options.data.absolute()
    say(f"undisturbed training, {processes} process(es), {steps} steps")
    whole = Training(data, options.out / f"undisturbed-{processes}", processes, steps)
    training = Training(data, options.out / f"killed-{processes}", processes, steps)
    try:
        return _compared(whole, training, count, moments)
    finally:  # nothing goes on where one of two processes failed, say
        whole.kill()
        training.kill()


def _compared(
    whole: Training, training: Training, count: int, moments: random.Random
) -> tuple[list[dict[str, Any]], bool]:
    whole.start()
    whole.finish()
    expected, processes = whole.rows(), training.processes
    kills: list[dict[str, Any]] = []
    for number in range(count):
        target = STEPS_A_KILL * number + moments.randrange(1, STEPS_A_KILL)
        in_save = number % 2 == 0
        training.start()
        _wait(training, target, in_save, moments.random() * 0.05)
        training.kill()
        killed_at, inside = training.step(), training.saving()
        if kills:  # what followed the kill before this one
            kills[-1]["equal"] = _equal(training.rows(), expected)
        kills.append({"processes": processes, "step": killed_at, "inside_save": inside, "equal": False})
        say(f"kill {number + 1}/{count} at step {killed_at}{', inside a save' if inside else ''}")
    training.start()
    training.finish()
    rows = training.rows()
    kills[-1]["equal"] = _equal(rows, expected) and rows.keys() == expected.keys()
    return kills, training.last_checksum() == whole.last_checksum()


def _equal(rows: dict[tuple[int, str], float], expected: dict[tuple[int, str], float]) -> bool:
    return all(expected.get(key) == value for key, value in rows.items())


def _wait(training: Training, target: int, in_save: bool, delay_s: float) -> None:
    """Return at a step, or in the first save after it."""
    deadline = time.monotonic() + TIMEOUT_S
    while training.step() < target:
        _check(training, deadline)
        time.sleep(POLL_S)
    if not in_save:
        time.sleep(delay_s)
        return
    while not training.saving():
        _check(training, deadline)


def _check(training: Training, deadline: float) -> None:
    if training.ended():
        training.finish()
        raise UserError(f"training in {training.run} ended before it could be killed; is the data too short?")
    if time.monotonic() > deadline:
        training.kill()
        raise UserError(f"training in {training.run} made no progress within {TIMEOUT_S:.0f} s")
