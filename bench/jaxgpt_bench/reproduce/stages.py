"""The stages of a reproduction: each is kept where its output fits what it would be made from.

Nothing beside the outputs says what is done: a data set has its manifest, a run its configuration and
summary, an artifact its certificate with the hash of its parent or the run's own weights, a measurement the
hashes of the models that it was made from. So a folder that the single commands filled is taken over, and one
that was changed is noticed. Each output appears under its name when it is whole.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_json
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.reproduce.figures import Made, StageEntry
from jaxgpt_bench.reproduce.minutes.clock import Clock

FIGURES_VERSION = 2  # of the measurements' files: those of another are measured anew
DIFFERENCES_SHOWN = 3
ORDER = ("data", "plan", "profile", "train", "convert", "qat", "quantize",
         "quality", "samples", "answers", "other-text", "memorization", "speed")  # fmt: skip
LEAST_S = 10.0  # of a call, with which nothing is begun


class StoppedError(Exception):
    """A stage did not come to its end: a check failed, or a training was asked to stop.

    Args:
      figures: of the stage.
      passed: no check failed.
      unfinished: the call's time is over; the same command goes on.
      interrupted: Ctrl-C ended it.
    """

    def __init__(
        self, figures: dict[str, Any], passed: bool, unfinished: bool = False, interrupted: bool = False
    ) -> None:
        super().__init__()
        self.result = Result(figures, passed, interrupted, unfinished)


@dataclasses.dataclass
class Stages:
    """What was done and what was kept.

    Attributes:
      redo: stages that are done again even where their output fits.
      log: an entry for each, in their order.
      clock: of this call and those before it; None where no time is bounded.
      until: the last stage that is to be done; None for all.
      needs_s: seconds that a call must have left to begin a stage.
    """

    redo: Sequence[str] = ()
    log: list[StageEntry] = dataclasses.field(default_factory=list)
    clock: Clock | None = None
    until: str | None = None
    needs_s: Callable[[str], float] = lambda stage: 0.0

    def kept(self, name: str, why: str, made: Mapping[str, Any]) -> None:
        """Note that a stage is skipped; `made` is what its output says of when it was made."""
        say(f"[{name}] kept: {why}")
        self.log.append(StageEntry(stage=name, kept=True, seconds=0.0, made=Made.from_json(made)))

    @contextlib.contextmanager
    def doing(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Note that a stage is done in this block; gives its `made`, filled when the block ends.

        The block may say its `seconds`, where other calls did a part of it.
        """
        self._require_time(name)
        say(f"[{name}] {what}")
        started = time.perf_counter()
        made: dict[str, Any] = {}
        try:
            yield made
        finally:
            seconds = round(time.perf_counter() - started, 1)
            if self.clock is not None:
                self.clock.note(_plain(name), seconds)
        say(f"[{name}] done in {seconds:,.0f} s")
        now = provenance()
        made |= Made(date=now.date, commit=now.commit, seconds=made.get("seconds", seconds)).to_json()
        self.log.append(StageEntry(stage=name, kept=False, seconds=seconds, made=Made.from_json(made)))

    def _require_time(self, name: str) -> None:
        """Stop before a stage that comes after the last one, or for which this call has no time.

        The first thing that a call does is begun in any case, else no call would ever get further.

        Raises:
          StoppedError: it is not begun.
        """
        stage = _plain(name)
        if self.until is not None and ORDER.index(stage) > ORDER.index(self.until):
            raise StoppedError({"stage": stage, "why": f"--stage {self.until} is done"}, passed=True)
        if self.clock is None:
            return
        needed, left = self.needs_s(stage), self.clock.left_s()
        if left < (max(needed, LEAST_S) if self.clock.worked else LEAST_S):
            why = f"{left:.0f} s of this call are left, {stage} takes about {max(needed, LEAST_S):.0f}"
            raise StoppedError({"stage": stage, "why": why}, passed=True, unfinished=True)
        if left < needed:
            say(f"[{name}] takes about {needed:.0f} s, this call has {left:.0f}: a larger budget is safer")

    def earlier(self, path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """Return a JSON file's figures where they were made from the same, else None and a line why.

        Args:
          path: the file; its stem names the stage.
          made_from: settings and hashes of the inputs.
        """
        if not path.exists():
            return None
        found = read_figures(path)
        if not found:
            say(f"[{path.stem}] {path} is damaged")
            return None
        was, now = found.get("made_from", {}), _made_from(made_from)
        if was == now:
            self.kept(path.stem, f"{path} was measured on these models with these settings", found["made"])
            return found
        say(f"[{path.stem}] {path} was made from something else: {_differing(was, now)}")
        return None

    def measured(
        self,
        path: Path,
        made_from: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
        group: str | None = None,
    ) -> dict[str, Any]:
        """Return a JSON file's figures, measured anew unless it was made from the same.

        Args:
          path: the file; its stem names the stage.
          made_from: settings and hashes of the inputs.
          measure: gives the figures.
          group: the name in `redo`, where it is not the stem.
        """
        if (group or path.stem) not in self.redo:
            found = self.earlier(path, made_from)
            if found is not None:
                return found
        with self.doing(path.stem, "measuring") as made:
            figures = measure()
        figures = {**figures, "made": made, "made_from": _made_from(made_from)}
        write_json(path, figures)
        return figures


def _plain(name: str) -> str:
    """Return a stage's name in ORDER: texts from elsewhere have their hash in it."""
    return "other-text" if name.startswith("other-text") else name


def read_figures(path: Path) -> dict[str, Any]:
    """Return a measurement's file; nothing where it is damaged: it is measured again."""
    try:
        return read_json(path, "figures")
    except UserError:
        return {}


def _made_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs as they are read back from JSON, with the version of the figures."""
    found: dict[str, Any] = json.loads(json.dumps({"figures_version": FIGURES_VERSION, **inputs}))
    return found


def _differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what differs, with both values."""
    keys = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    shown = [f"{key} {_short(was.get(key))} -> {_short(now.get(key))}" for key in keys[:DIFFERENCES_SHOWN]]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def require(result: Result, stage: str) -> None:
    """Stop where a command's check failed."""
    if not result.passed:
        raise StoppedError({"why": "a check failed", **result.figures, "stage": stage}, passed=False)


@contextlib.contextmanager
def made_by_removing(folder: Path) -> Iterator[None]:
    """Say what makes a damaged folder anew: what the single commands advise is no option here."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (here: remove {folder}, and the same command makes it anew)") from None
