"""From losses of trainings to steps to a loss.

A schedule ends with its training, so a loss on the way says nothing of a shorter training: the curve of a row
is the final losses of trainings of several lengths. Between two lengths the loss is taken as linear in the
logarithm of the steps. A row of one length takes Muon's curve: it has the loss that Muon has after s steps,
and so needs length / s of Muon's steps.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from jaxgpt_bench.common.json_data import JsonData
from jaxgpt_bench.recipe.runs import Outcome

REFERENCE, BASE = "adamw", "muon"
Curve = Mapping[int, float]  # final losses by number of steps


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeRow(JsonData):
    """A row of the table.

    Attributes:
      name: of the row.
      seeds: how many.
      steps: length of the trainings whose loss is given, the longest that all seeds have.
      val_loss: nats per token.
      against_muon: loss minus Muon's, of the same seed and number of steps; None where that is not there.
      steps_to_target: to AdamW's loss at its longest; None where nothing tells.
      share_of_adamw: the same as a share of AdamW's steps.
      extrapolated: whether the target lies outside the row's lengths.
      cpu_seconds_a_step: median over its trainings.
      cpu_seconds_to_target: steps to the target times that.
    """

    name: str
    seeds: int
    steps: int
    val_loss: Estimate
    against_muon: Estimate | None
    steps_to_target: Estimate | None
    share_of_adamw: float | None
    extrapolated: bool
    cpu_seconds_a_step: float
    cpu_seconds_to_target: float | None


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
    for each in outcomes:
        curves.setdefault(each.run.row, {})
        if each.val_loss is not None:
            curves[each.run.row].setdefault(each.run.seed, {})[each.run.steps] = each.val_loss
    target = _target(curves.get(REFERENCE, {}))
    return tuple(_row(name, curves, target, outcomes) for name in curves if curves[name])


def _common(curves: Mapping[int, Curve]) -> list[int]:
    """Return the lengths that every seed of a row has."""
    return sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []


def _target(reference: Mapping[int, Curve]) -> tuple[float, int] | None:
    """Return AdamW's mean loss at its longest, and that length."""
    if not (lengths := _common(reference)):
        return None
    return statistics.fmean(curve[lengths[-1]] for curve in reference.values()), lengths[-1]


def _row(
    name: str,
    curves: Mapping[str, Mapping[int, Curve]],
    target: tuple[float, int] | None,
    outcomes: Sequence[Outcome],
) -> RecipeRow:
    own, base = curves[name], curves.get(BASE, {})
    lengths = _common(own)
    steps = lengths[-1]
    if name not in (REFERENCE, BASE) and (shared := [s for s in lengths if s in _common(base)]):
        steps = shared[-1]
    differences = [own[seed][steps] - base[seed][steps] for seed in own if steps in base.get(seed, {})]
    needed = [] if target is None else [_needed(own[seed], base.get(seed, {}), target[0]) for seed in own]
    needed = [found for found in needed if math.isfinite(found)]
    of_target = Estimate.of(needed) if needed else None
    cost = statistics.median(o.cpu_seconds / o.run.steps for o in outcomes if o.run.row == name)
    mean_needed = of_target.mean if of_target else None
    outside = mean_needed is not None and not lengths[0] <= mean_needed <= lengths[-1]
    return RecipeRow(
        name=name,
        seeds=len(own),
        steps=steps,
        val_loss=Estimate.of([curve[steps] for curve in own.values()]),
        against_muon=Estimate.of(differences) if differences and name != BASE else None,
        steps_to_target=of_target,
        share_of_adamw=None if target is None or mean_needed is None else mean_needed / target[1],
        extrapolated=outside and len(lengths) > 1,
        cpu_seconds_a_step=cost,
        cpu_seconds_to_target=None if mean_needed is None else mean_needed * cost,
    )


def _needed(curve: Curve, base: Curve, target: float) -> float:
    """Return the steps to the target: by the row's own curve, or by Muon's where it has one length."""
    if len(curve) > 1:
        return steps_to(curve, target)
    if len(base) < 2:
        return math.nan
    ((steps, loss),) = curve.items()
    return steps_to(base, target) * steps / steps_to(base, loss)
