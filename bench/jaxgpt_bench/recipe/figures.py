"""From losses of trainings to steps to a loss.

A schedule ends with its training, so a loss on the way says nothing of a shorter training: the curve of a row
is the final losses of trainings of several lengths. Between two lengths the loss is taken as linear in the
logarithm of the steps. A row of one length takes Muon's curve, the mean over seeds: with a loss d above
Muon's (of the same seed and length N) it has what Muon has after s steps, and needs N / s of Muon's steps.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData
from jaxgpt_bench.recipe.runs import Outcome

REFERENCE, BASE = "adamw", "muon"
Curve = Mapping[int, float]  # final losses by number of steps
Curves = Mapping[int, Curve]  # by seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(JsonData):
    """A figure over seeds.

    Attributes:
      mean: over them.
      error: standard error of the mean; None with one seed.
    """

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Take what each seed gave."""
        several = len(values) > 1
        error = statistics.stdev(values) / math.sqrt(len(values)) if several else None
        return cls(mean=statistics.fmean(values), error=error)


def with_error(found: Estimate | None, digits: int, sign: str = "") -> str:
    """Return a figure with so many digits and its error, for a table; "" for none."""
    if found is None:
        return ""
    error = "" if found.error is None else f" ± {found.error:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{error}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeRow(JsonData):
    """A row of the table.

    Attributes:
      name: of the row.
      seeds: how many.
      steps: length of the trainings whose loss is given, the longest that all seeds have.
      val_loss: nats per token, mean over the seeds that have one; None where none has.
      against_muon: loss minus Muon's, of the same seed and number of steps; None where that is not there. As
        all that follows it is None, too, where a seed diverged in so many steps or fewer: the others alone
        would tell too little loss.
      steps_to_target: to AdamW's loss at its longest; None where nothing tells.
      share_of_adamw: the same as a share of AdamW's steps.
      extrapolated: whether the target lies beyond the lengths of the row, or of Muon's where it has one.
      cpu_seconds_a_step: median over its trainings.
      cpu_seconds_to_target: steps to the target times that.
      diverged: seeds with a training whose loss is no number, of any length; None without one.
    """

    name: str
    seeds: int
    steps: int
    val_loss: Estimate | None
    against_muon: Estimate | None
    steps_to_target: Estimate | None
    share_of_adamw: float | None
    extrapolated: bool
    cpu_seconds_a_step: float
    cpu_seconds_to_target: float | None
    diverged: int | None = dataclasses.field(default=None, metadata=LEFT_OUT)


def loss_text(row: RecipeRow) -> str:
    """Return a row's loss, and how many seeds have none."""
    lost = "" if row.diverged is None else f"diverged ({row.diverged} of {row.seeds} seeds)"
    return ", ".join(filter(None, (with_error(row.val_loss, 4), lost)))


def steps_to(curve: Curve, loss: float) -> float:
    """Return after how many steps a curve of at least two lengths has a loss.

    Between two lengths, and beyond the first and last, the loss is linear in the logarithm of the steps.
    Losses must fall with length; a length that is worse than a shorter one is passed over.
    """
    points: list[tuple[int, float]] = []
    for steps, value in sorted(curve.items()):
        if not points or value < points[-1][1]:
            points.append((steps, value))
    if len(points) < 2:
        return math.nan
    pairs = list(itertools.pairwise(points))
    (s1, l1), (s2, l2) = next((pair for pair in pairs if loss >= pair[1][1]), pairs[-1])
    share = (l1 - loss) / (l1 - l2)
    return s1 * (s2 / s1) ** share


def recipe_rows(outcomes: Sequence[Outcome]) -> tuple[RecipeRow, ...]:
    """Make the table's rows, in the order in which they first appear."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    diverged: dict[str, dict[int, int]] = {}  # the shortest length of a seed that did
    for each in outcomes:
        name, seed, steps = each.run.row, each.run.seed, each.run.steps
        own, lost = curves.setdefault(name, {}), diverged.setdefault(name, {})
        if each.val_loss is None:
            lost[seed] = min(steps, lost.get(seed, steps))
        else:
            own.setdefault(seed, {})[steps] = each.val_loss
    # Seeds that share no length so far give no row yet.
    shown = [name for name in curves if _common(curves[name]) or diverged[name]]
    return tuple(_row(name, curves, outcomes, diverged[name]) for name in shown)


def _row(
    name: str, curves: Mapping[str, Curves], outcomes: Sequence[Outcome], diverged: Mapping[int, int]
) -> RecipeRow:
    own, base, reference = curves[name], curves.get(BASE, {}), curves.get(REFERENCE, {})
    lengths = _common(own)
    shared = [steps for steps in lengths if steps in _common(base)]
    steps = (shared or lengths or sorted(diverged.values()))[-1]
    whole = bool(lengths) and all(lost > steps for lost in diverged.values())
    pairs = [(own[seed][steps], base[seed][steps]) for seed in own if whole and steps in base.get(seed, {})]
    differences = [loss - muon for loss, muon in pairs]
    needed = _steps_to_target(name, own, base, reference, differences, steps) if whole else None
    cost = statistics.median(o.cpu_seconds / o.run.steps for o in outcomes if o.run.row == name)
    of_several = own if any(len(curve) > 1 for curve in own.values()) else base  # whose curve tells
    beyond = _is_beyond(of_several, _target(reference)) if name != REFERENCE and needed is not None else False
    return RecipeRow(
        name=name,
        seeds=len({*own, *diverged}),
        steps=steps,
        val_loss=Estimate.of([curve[steps] for curve in own.values()]) if lengths else None,
        against_muon=Estimate.of(differences) if differences and name != BASE else None,
        steps_to_target=needed,
        share_of_adamw=None if needed is None else needed.mean / _common(reference)[-1],
        extrapolated=beyond,
        cpu_seconds_a_step=cost,
        cpu_seconds_to_target=None if needed is None else needed.mean * cost,
        diverged=len(diverged) or None,
    )


def _common(curves: Curves) -> list[int]:
    """Return the lengths that every seed of a row has."""
    return sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []


def _mean_curve(curves: Curves) -> Curve:
    """Return the mean over the seeds that have every length of the row."""
    every = {steps for curve in curves.values() for steps in curve}
    whole = [curve for curve in curves.values() if set(curve) == every]
    return {steps: statistics.fmean(curve[steps] for curve in whole) for steps in every} if whole else {}


def _steps_to_target(
    name: str, own: Curves, base: Curves, reference: Curves, differences: Sequence[float], steps: int
) -> Estimate | None:
    """Return the steps to AdamW's mean loss at its longest: AdamW's by definition, others' by a curve."""
    target = _target(reference)
    if target is None:
        return None
    if name == REFERENCE:
        return Estimate(mean=float(_common(reference)[-1]), error=None)
    if by_own := _known(steps_to(curve, target) for curve in own.values()):
        return Estimate.of(by_own)
    curve, of_base = _mean_curve(base), _known(steps_to(curve, target) for curve in base.values())
    if not of_base or steps not in curve:
        return None
    shares = _known(steps / steps_to(curve, curve[steps] + difference) for difference in differences)
    return _product(Estimate.of(shares), Estimate.of(of_base)) if shares else None


def _target(reference: Curves) -> float | None:
    """Return AdamW's mean loss at its longest; None where its seeds share no length."""
    lengths = _common(reference)
    return statistics.fmean(curve[lengths[-1]] for curve in reference.values()) if lengths else None


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _is_beyond(curves: Curves, target: float | None) -> bool:
    """Whether a loss is reached, on the mean over seeds, before the shortest length or after the longest."""
    taken = sorted({length for curve in curves.values() for length in curve})
    found = [] if target is None else _known(steps_to(curve, target) for curve in curves.values())
    return bool(found) and not taken[0] <= statistics.fmean(found) <= taken[-1]


def _product(one: Estimate, other: Estimate) -> Estimate:
    """Return a product with the error that both factors, taken as independent, give it."""
    if one.error is None or other.error is None:
        return Estimate(mean=one.mean * other.mean, error=None)
    error = math.hypot(one.error * other.mean, other.error * one.mean)
    return Estimate(mean=one.mean * other.mean, error=error)
