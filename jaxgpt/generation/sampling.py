"""Choosing the next token from logits: one definition for the JAX and the PyTorch side.

Numpy in float64, one uniform random number a token: the same seed draws the same token from any session with
the same logits, so that samples of two models differ only where their distributions do.
"""

import dataclasses
import numbers

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.errors import UserError, quoted

SORTED_FIRST = 64  # most probable tokens that are sorted first; the whole vocabulary only if they do not do


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p; 1 keeps all.
      min_p: keep the tokens that are at least so probable as the most probable one times this; 0 keeps all.
      seed: of the random numbers.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed", "min_p"):
            require_number(name, getattr(self, name), whole=name in ("top_k", "seed"))
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature ({self.temperature}) must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p ({self.top_p}) must lie in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p ({self.min_p}) must lie in [0, 1]")
        if self.seed < 0:
            raise UserError(f"seed ({self.seed}) must not be negative")


def require_number(name: str, value: object, *, whole: bool) -> None:
    """Raise UserError unless a value is a number, and a whole one where that is asked for."""
    if not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise UserError(f"{name} ({quoted(value)}) must be a {'whole ' if whole else ''}number")


class Sampler:
    """Draws tokens; one object a generated text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the most probable token always."""
        return self._sampling.temperature == 0

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
          logits: (V,).

        Returns:
          Its id. Ties go to the lower id.

        Raises:
          UserError: a logit is not finite.
        """
        if not np.isfinite(logits).all():
            raise UserError("the model's logits hold NaN or infinity; its weights are damaged")
        if self._sampling.temperature == 0:
            return int(np.argmax(logits))
        scaled = _divide_by_temperature(logits, self._sampling.temperature)
        uniform = self._random.random()
        for count in (SORTED_FIRST, len(scaled)) if self._sampling.top_k == 0 else (self._sampling.top_k,):
            token = _among_largest(scaled, count, self._sampling, uniform)
            if token is not None:
                return token
        raise AssertionError("all tokens are always enough")


def _divide_by_temperature(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    off = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 makes all but the largest -inf, as it should
        return (off - off.max()) / temperature


def _largest(scaled: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Return the places of the `count` largest, the largest first, the lower place of equals first."""
    if count >= len(scaled):
        return np.argsort(-scaled, kind="stable")
    least = np.partition(scaled, len(scaled) - count)[len(scaled) - count]
    places = np.flatnonzero(scaled >= least)
    return places[np.argsort(-scaled[places], kind="stable")][:count]


def _among_largest(
    scaled: npt.NDArray[np.float64], count: int, sampling: Sampling, uniform: float
) -> int | None:
    """Return the token at which the cumulative probability passes `uniform`, the most probable tokens first.

    Sorting a vocabulary takes as long as a step of a small model, so only the `count` most probable tokens
    are sorted.

    Args:
      scaled: (V,), logits divided by the temperature, the largest 0.
      count: tokens that are sorted; with top_k, k.
      sampling: top_k, top_p and min_p cut the distribution, which is normalized again.
      uniform: in [0, 1).

    Returns:
      The token; None when it lies beyond those that are sorted.
    """
    order = _largest(scaled, count)
    weights = np.exp(scaled[order])
    reached = np.cumsum(weights)
    whole = len(order) == len(scaled) or sampling.top_k > 0
    kept, total = len(order), reached[-1] if whole else np.exp(scaled).sum()
    if sampling.top_p < 1.0:
        kept = int((reached - weights < sampling.top_p * total).sum())
        if kept == len(order) and not whole:
            return None
        total = reached[kept - 1]
    if sampling.min_p > 0.0:
        likely = int((weights >= sampling.min_p).sum())  # the largest weight is 1
        if likely == len(order) and not whole:
            return None
        kept = min(kept, likely)
        total = reached[kept - 1]
    at = int(np.searchsorted(reached[:kept], uniform * total, side="right"))
    if at < kept or whole:
        return int(order[min(at, kept - 1)])
    return None
