"""OUT/results/: what matters of an experiment, in a few files that are small enough to be sent.

report.html, report.json   the page and its figures (once everything is measured)
run.json                   the plan and what it took, the calls, losses and step times of both trainings
profile.json               where a training step's time goes (on a GPU)
measured.json              all that the stages measured, every sample and answer included
answers.md                 the answers to requests, for readers (of presets that are asked some)

Written at the end of each call, of what there is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_atomic
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.reproduce.minutes.clock import Clock, clock_text
from jaxgpt_bench.reproduce.minutes.plan import PLAN

FOLDER = "results"
COPIED = ("report.html", "report.json", "profile.json", "answers.md")
MEASURED = ("quality", "samples", "answers", "memorization", "speed")
RUNS = ("run", "qat")
MOST_ROWS = 1000  # of a training's metrics
MOST_BYTES = 4_000_000  # of a file


def write_results(out: Path, clock: Clock) -> None:
    """Write OUT/results/ of what there is, say how large it is and what the experiment took so far."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    measured = {name: found for name in MEASURED if (found := _json(out / f"{name}.json"))}
    others = [_json(path) for path in sorted(out.glob("other-text-*.json"))]
    contents: dict[str, bytes] = {
        "run.json": _packed(run_figures(out, clock)),
        "measured.json": _packed({**measured, "other_text": others}),
    }
    contents |= {name: (out / name).read_bytes() for name in COPIED if (out / name).exists()}
    for name, content in contents.items():
        if len(content) > MOST_BYTES:
            say(f"{out / name} has {len(content) / 1e6:.1f} MB and is left out of {folder}")
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomic(folder / name, content)
    size = math.fsum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    say(f"{folder}: {size / 1e6:.1f} MB; {clock_text(clock.spent_s())} so far")


def run_figures(out: Path, clock: Clock) -> dict[str, Any]:
    """Return plan, time taken, machine, losses and step times."""
    plan = _json(out / PLAN)
    took = clock.stage_seconds()
    return {
        **provenance().to_json(),
        "plan": plan,
        "spent_s": round(clock.spent_s(), 1),
        "took_s": took,
        "trainings": {name: training_figures(out / name) for name in RUNS if (out / name).is_dir()},
    }


def training_figures(run: Path) -> dict[str, Any]:
    """Return a run's settings, its summary, and its metrics, thinned: a row for each kept step."""
    rows = [row for row in _lines(run / "metrics.jsonl") if "step" in row]
    steps = [row for row in rows if "val_loss" not in row]
    return {
        "config": _json(run / "config.json"),
        "summary": _json(run / "summary.json"),
        "steps": len(steps),
        "metrics": _columns(thinned(steps, MOST_ROWS)),
        "validations": [row for row in rows if "val_loss" in row],
    }


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """Return so many rows at most, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(at * (len(rows) - 1) / (most - 1))] for at in range(most)]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as a list for each name; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, up to the first that a killed process left half-written."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file; None where there is no whole one."""
    try:
        return read_json(path, "figures")
    except UserError:
        return None


def _packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
