"""What `jaxgpt-bench quality` says of changes at single positions, each with a standard error.

The figures are those of llama.cpp's `perplexity --kl-divergence`: mean KL and its 99.9th percentile, the
root mean square of the change in probability of the right token, the share of positions with the same most
probable token. Its errors take tokens as independent; here a window is the unit: tokens of one text are not.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxgpt_export.parity.quality import Quality, ratio_error

Float64Array = npt.NDArray[np.float64]

TAIL = 0.999
REPLICATES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeFigures:
    """The figures of a row that come from `Changes`; an error is None where there is one window.

    Attributes:
      kl_mean_error: of the mean KL divergence, nats.
      kl_p999: 99.9th percentile of the KL divergence over positions, nats.
      kl_p999_error: its error.
      rms_probability_change: root mean square of the change in probability of the right token.
      rms_probability_change_error: its error.
      top1_error: of the share of positions with the same most probable token.
    """

    kl_mean_error: float | None
    kl_p999: float
    kl_p999_error: float | None
    rms_probability_change: float
    rms_probability_change_error: float | None
    top1_error: float | None


def change_figures(found: Quality) -> ChangeFigures | None:
    """Return a model's figures; None for the reference."""
    changes, tokens = found.changes, found.window_tokens
    if changes is None:
        return None
    rms, rms_error = root_mean_square(changes.probability, tokens)
    return ChangeFigures(
        kl_mean_error=mean_error(changes.kl, tokens),
        kl_p999=float(np.quantile(changes.kl, TAIL)),
        kl_p999_error=quantile_error(changes.kl, tokens, TAIL),
        rms_probability_change=rms,
        rms_probability_change_error=rms_error,
        top1_error=mean_error(changes.same_top.astype(np.float64), tokens),
    )


def mean_error(values: Float64Array, window_tokens: Sequence[int]) -> float | None:
    """Return the standard error of a mean over positions (N,), windows being the unit."""
    sums = np.zeros(len(window_tokens))
    np.add.at(sums, _windows(window_tokens), values)
    return ratio_error(sums, window_tokens)


def root_mean_square(values: Float64Array, window_tokens: Sequence[int]) -> tuple[float, float | None]:
    """Return sqrt(mean(x^2)) over positions (N,) and its standard error.

    The error is the mean square's, carried through the root: error / (2 sqrt(mean)).
    """
    squares = values**2
    root, error = math.sqrt(squares.mean()), mean_error(squares, window_tokens)
    return root, error if error is None or root == 0 else error / (2 * root)


def quantile_error(values: Float64Array, window_tokens: Sequence[int], fraction: float) -> float | None:
    """Return the standard error of a quantile over positions (N,): a bootstrap that draws whole windows.

    Args:
      values: (N,), the windows one after the other.
      window_tokens: (W,), positions of each.
      fraction: of the positions that lie below, interpolated as numpy does.

    Returns:
      The standard deviation over REPLICATES draws of W windows with replacement, always the same draws; None
      for fewer than two windows.

    Source: Efron 1979, Bootstrap methods.
    """
    filled = [tokens for tokens in window_tokens if tokens]
    if len(filled) < 2:
        return None
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], _windows(filled)[order]
    draw = np.random.default_rng(0)
    found = []
    for _ in range(REPLICATES):
        times = np.bincount(draw.integers(len(filled), size=len(filled)), minlength=len(filled))
        upto = np.cumsum(times[owner])
        place = fraction * (upto[-1] - 1)
        below, above = ordered[np.searchsorted(upto, [math.floor(place), math.ceil(place)], side="right")]
        found.append(below + (place % 1) * (above - below))
    return float(np.std(found, ddof=1))


def _windows(window_tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the number of each position's window (N,)."""
    return np.repeat(np.arange(len(window_tokens)), window_tokens)
