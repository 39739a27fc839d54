"""A finished training of a reproduction: made where there is none that fits, and when it was made."""

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json
from jaxgpt_bench.reproduce.stages import Stages, StoppedError, made_by_removing, read_figures


def trained(
    stages: Stages, name: str, out: Path, settings: dict[str, Any], dataset: Dataset, saving_s: float = 0.0
) -> Path:
    """Return a finished run, trained (or trained on) where it is not finished.

    Args:
      stages: where it is noted.
      name: of the stage.
      out: the run folder.
      settings: other options of `jaxgpt train`.
      dataset: what it is trained on.
      saving_s: seconds before the end of the call's time at which it saves and leaves.

    Raises:
      UserError: the folder holds another training, or is damaged.
      StoppedError: the training was asked to stop, or failed.
    """
    from jaxgpt.training.options import train_options
    from jaxgpt.training.run.folder import read_run_config
    from jaxgpt.training.train import train

    options = train_options(data=dataset.folder, out=out, **settings)
    if (out / "config.json").exists():
        with made_by_removing(out):
            read_run_config(out)
    # What it began with may have been trained again.
    with contextlib.nullcontext() if options.init is None else made_by_removing(out):
        finished = is_finished(options, dataset)
    if finished:
        stages.kept(name, f"{out} is this training, finished", made_of_run(out))
        return out
    clock = stages.clock
    stopping = contextlib.nullcontext() if clock is None else clock.stopping_training(saving_s)
    with stages.doing(name, f"training in {out}") as made:
        with stopping:
            result = train(options)
        if "stopped" in result.figures or not result.passed:
            goes_on = result.passed and not result.interrupted
            why = f"step {result.figures.get('steps')} of {options.training.max_steps} is saved"
            figures = {"stage": name, "why": why, **result.figures}
            raise StoppedError(figures, result.passed, goes_on, result.interrupted)
        read_summary(out)
        if seconds := made_of_run(out)["seconds"]:
            made["seconds"] = seconds  # of all its steps: this call may have done the last ones
    return out


def read_summary(run: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Raises:
      UserError: it is missing or damaged. A training writes it after its last step, so that is done again.
    """
    try:
        return read_json(run / "summary.json", "summary of a finished run")
    except UserError:
        steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
        last = run / "checkpoints" / str(max(steps, default="*"))
        raise UserError(
            f"{run / 'summary.json'} is missing or damaged, though its run is done; remove it and {last}; "
            "the same command then trains the last steps again and writes it"
        ) from None


def made_of_run(run: Path) -> dict[str, Any]:
    """Return when a run was made: date of its last checkpoint, seconds of its steps.

    Compilation, validations and samples are not in the seconds. A run does not tell its commit.
    """
    from jaxgpt.training.run.folder import read_metrics

    seconds = seconds_of_steps(read_metrics(run))
    files = (run / "checkpoints").glob("*/_CHECKPOINT_METADATA")  # Orbax's
    saved = [read_figures(path).get("commit_timestamp_nsecs") or 0 for path in files]
    last = max(saved, default=0) / 1e9
    date = datetime.datetime.fromtimestamp(last, datetime.UTC).isoformat(timespec="seconds") if last else None
    return {"date": date, "seconds": round(seconds, 1) if seconds else None}


def seconds_of_steps(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Add up the time between the steps of metrics.jsonl.

    step_ms is a mean over the last RATE_STEPS steps, or over those since the last pause, which begins with a
    step that has none: so the last means of a stretch, one every RATE_STEPS, are the whole of it.
    """
    from jaxgpt.training.run.recorder import RATE_STEPS

    stretches: list[list[float]] = [[]]
    for row in metrics:
        if "step_ms" in row:
            stretches[-1].append(row["step_ms"])
        elif "loss" in row:
            stretches.append([])
    return math.fsum(
        means[end - 1] * min(end, RATE_STEPS) / 1e3
        for means in stretches
        for end in range(len(means), 0, -RATE_STEPS)
    )


def is_finished(options: Any, dataset: Dataset) -> bool:
    """Tell whether a run folder holds the finished training of these options; nothing is written.

    Raises:
      UserError: it holds another training, or its summary is damaged.
    """
    from jaxgpt.training.options import as_begun, run_config
    from jaxgpt.training.run.folder import require_same_training
    from jaxgpt.training.run.init_from import open_init_source

    if not (options.out / "config.json").exists():
        return False
    initial = None if options.init is None else open_init_source(options.init)
    config = as_begun(run_config(options, dataset, initial), options.out, options.given)
    if initial is not None:
        config = dataclasses.replace(config, init=initial.read(config.model)[1])
    require_same_training(options.out, config)
    whole = (options.out / "summary.json").exists()
    return whole and read_summary(options.out).get("steps") == config.train.max_steps


def best_step(run: Path) -> int:
    """Return the step of a run's best checkpoint."""
    from jaxgpt.training.run.checkpoints import Checkpoints
    from jaxgpt.training.run.folder import read_run_config

    checkpoints = Checkpoints(run, read_only=True, data_since=read_run_config(run).data_since)
    try:
        return checkpoints.resolve("best")
    finally:
        checkpoints.close()
