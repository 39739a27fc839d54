"""summary.json: the figures of a finished run, written after its last step; imports no JAX.

A run that is extended keeps the summary of its former end until it is done.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json
from jaxgpt.training.run.folder import read_run_config

WHAT = "summary of a finished run"


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json; UserError where the run is not finished, or is being extended."""
    summary = read_json(folder / "summary.json", WHAT)
    steps = read_run_config(folder).train.max_steps
    if summary.get("steps") != steps:
        raise UserError(
            f"{folder} is not finished: its summary is of {summary.get('steps')} steps, its training has "
            f"{steps}; finish it with the same `jaxgpt train`"
        )
    return summary


def finished_steps(folder: Path) -> int | None:
    """Return of how many steps summary.json is; None where there is no whole one."""
    with contextlib.suppress(UserError):
        steps = read_json(folder / "summary.json", WHAT).get("steps")
        return steps if isinstance(steps, int) else None
    return None


def losses_figures(rows: Sequence[Mapping[str, Any]], data_since: int, taken: int | None) -> dict[str, Any]:
    """Return what the summary says of the validation losses.

    Args:
      rows: of metrics.jsonl.
      data_since: losses up to this step are of another data set.
      taken: the step that evaluate and convert take.
    """
    measured = [row for row in rows if "val_loss" in row]
    comparable = [row for row in measured if row["step"] > data_since] or measured
    finite = [row for row in comparable if math.isfinite(row["val_loss"])] or comparable
    best, last = min(finite, key=lambda row: row["val_loss"]), measured[-1]
    return {
        "val_loss": last["val_loss"],
        "val_bits_per_byte": last["val_bits_per_byte"],
        "best_step": best["step"],
        "best_val_loss": best["val_loss"],
        "convert_step": taken,
    }
