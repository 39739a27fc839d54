"""The estimates and their errors: pass@k, paired differences, what a measurement could have shown."""

import math
from collections.abc import Sequence

import numpy as np

from jaxgpt.shared.errors import UserError

RULE_OF_THREE = 3.0  # no success in n tries: below 3 / n with 95 % confidence
SHOWN = 1.96  # standard errors that a difference must exceed


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that one of k samples passes, estimated without bias from n >= k.

    1 - C(n - c, k) / C(n, k). Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code,
    arXiv:2107.03374.

    Raises:
      UserError: there are fewer samples than k.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs at least {k} samples a problem, got {samples}")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for one value."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the differences, place by place, and its standard error."""
    return mean_and_error([a - b for a, b in zip(values, reference, strict=True)])


def smallest_shown(values: Sequence[float], reference: Sequence[float] | None = None) -> float:
    """Return the smallest difference that scores of so many problems could have shown.

    1.96 standard errors of the paired difference from the reference's scores; where there is no reference,
    of the difference of two such scores. Where nothing was solved, or the same, what that leaves open.

    Args:
      values: one score a problem.
      reference: of the same problems, or None.
    """
    if reference is None:
        error = math.sqrt(2) * (mean_and_error(values)[1] or 0.0)
    else:
        error = paired_difference(values, reference)[1] or 0.0
    return SHOWN * error if error > 0 else RULE_OF_THREE / max(len(values), 1)
