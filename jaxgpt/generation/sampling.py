"""Choosing the next token from logits: one definition for the JAX and the PyTorch side.

Numpy in float64, one uniform random number a token: the same seed draws the same token from any session with
the same logits, so that samples of two models differ only where their distributions do.
"""

import dataclasses
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.errors import UserError, quoted

# How tokens are drawn where neither a user nor the model says so.
DEFAULTS: Mapping[str, int | float] = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.05}
# What changes logits by the tokens before them (see repetition.py), with the values that change nothing.
NO_PENALTY: Mapping[str, int | float] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
WHOLE = ("top_k", "no_repeat_ngram_size", "seed")  # numbers
LEAST_PENALTY, LARGEST_PENALTY = 0.01, 100.0  # beyond them logits could overflow float32
MOST_PROBABLE = 1e-9  # a top_p that keeps one token, as others mean by 0
LARGEST_FLOAT = sys.float_info.max  # a whole number beyond it divides no logits
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
      repetition_penalty: divides the logits of tokens that the text has, its prompt included, where they are
        positive, and multiplies them where they are negative; 1 changes nothing.
      no_repeat_ngram_size: no run of so many tokens comes twice; 0 lets all come.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name in (*DEFAULTS, *NO_PENALTY, "seed"):
            require_number(name, getattr(self, name), whole=name in WHOLE)
        if not 0.0 <= self.temperature <= LARGEST_FLOAT:
            got = quoted(self.temperature)
            raise UserError(
                f"temperature ({got}) must be 0 (greedy) or a positive number up to {LARGEST_FLOAT:g}"
            )
        if self.top_k < 0:
            raise UserError(f"top_k ({quoted(self.top_k)}) must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p ({quoted(self.top_p)}) must lie in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p ({quoted(self.min_p)}) must lie in [0, 1]")
        if not LEAST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            got = quoted(self.repetition_penalty)
            raise UserError(
                f"repetition_penalty ({got}) must lie in [{LEAST_PENALTY:g}, {LARGEST_PENALTY:g}]; 1 is none"
            )
        if self.no_repeat_ngram_size < 0:
            got = quoted(self.no_repeat_ngram_size)
            raise UserError(f"no_repeat_ngram_size ({got}) must be 0 (any may repeat) or more")
        if self.seed < 0:
            raise UserError(f"seed ({quoted(self.seed)}) must not be negative")


def choose_sampling(model: Mapping[str, int | float], seed: int, **asked: int | float | None) -> Sampling:
    """Return how tokens are drawn: as was asked, else as the model says, else as DEFAULTS have it.

    Args:
      model: what the model's generation_config.json says of DEFAULTS and NO_PENALTY.
      seed: of the random numbers.
      asked: the same six; None, or one that is left out, asks for nothing.

    Raises:
      UserError: a value outside its range.
    """
    values: dict[str, Any] = {**DEFAULTS, **model}
    values |= {name: value for name, value in asked.items() if value is not None}
    return Sampling(**values, seed=seed)


def damaged_model() -> UserError:
    """Return the error of logits that are not finite."""
    return UserError("the model's logits hold NaN or infinity; its weights are damaged")


def require_number(name: str, value: object, *, whole: bool) -> None:
    """Raise UserError unless a value is a number, and a whole one where that is asked for."""
    if not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise UserError(f"{name} ({quoted(value)}) must be a {'whole ' if whole else ''}number")


class Top(NamedTuple):
    """What drawing a token and scoring one need of a row of logits.

    Attributes:
      ids: (N,), the most probable tokens, the most probable first, the lower id of equals first.
      scaled: (N,), their (logit - largest logit) / temperature.
      total: the sum of exp of these over the whole row.
    """

    ids: npt.NDArray[np.integer[Any]]
    scaled: npt.NDArray[np.float64]
    total: float


def top_of_row(logits: npt.NDArray[np.float32], temperature: float, count: int) -> Top:
    """Return the Top of logits (V,), with `count` tokens at most: the one definition.

    A session may do it itself, in another order of the sum: that changes its last bits.
    """
    scaled = _divide_by_temperature(logits, temperature)
    ids = _largest(scaled, count)
    return Top(ids, scaled[ids], float(np.exp(scaled).sum()))


def tops_in_numpy(
    logits: npt.NDArray[np.float32], temperatures: Sequence[float], count: int
) -> list[Top | None]:
    """Return the Top of each row of logits (M, V), None for one that is not finite."""
    return [
        top_of_row(row, temperature, count) if np.isfinite(row).all() else None
        for row, temperature in zip(logits, temperatures, strict=True)
    ]


def draws_in_numpy(
    logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> list[int | None]:
    """Return the token drawn from each row of logits (M, V), None for one that is not finite."""
    return [
        draw_token(row, sampling, uniform) if np.isfinite(row).all() else None
        for row, sampling, uniform in zip(logits, samplings, uniforms, strict=True)
    ]


class Sampler:
    """Draws tokens; one object a generated text.

    Attributes:
      sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the most probable token always."""
        return self.sampling.temperature == 0

    def next_uniform(self) -> float:
        """Return the random number in [0, 1) of the next token; greedily none is needed, and 0 returned."""
        return 0.0 if self.greedy else self._random.random()

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
            raise damaged_model()
        return draw_token(logits, self.sampling, self.next_uniform())


def draw_token(logits: npt.NDArray[np.float32], sampling: Sampling, uniform: float) -> int:
    """Return the token at which the cumulative probability passes `uniform`: the one definition.

    A session may do it itself, with sums in another order: that changes their last bits.

    Args:
      logits: (V,), finite.
      sampling: how it is drawn.
      uniform: in [0, 1).
    """
    temperature = sampling.temperature
    if temperature == 0:
        return int(np.argmax(logits))
    top = top_of_row(logits, temperature, sampling.top_k or SORTED_FIRST)
    token = _among_largest(top, len(logits), sampling, uniform)
    if token is None:
        token = _among_largest(top_of_row(logits, temperature, len(logits)), len(logits), sampling, uniform)
    assert token is not None, "all tokens are always enough"
    return token


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


def _among_largest(top: Top, vocab_size: int, sampling: Sampling, uniform: float) -> int | None:
    """Return the token at which the cumulative probability passes `uniform`, the most probable tokens first.

    Sorting a vocabulary takes as long as a step of a small model, so only the most probable tokens are.

    Args:
      top: with at least top_k tokens.
      vocab_size: V.
      sampling: top_k, top_p and min_p cut the distribution, which is normalized again.
      uniform: in [0, 1).

    Returns:
      The token; None when it lies beyond those that are sorted.
    """
    kept = min(sampling.top_k or len(top.ids), len(top.ids))
    order = top.ids[:kept]
    weights = np.exp(top.scaled[:kept])
    reached = np.cumsum(weights)
    whole = len(order) == vocab_size or sampling.top_k > 0
    total = reached[-1] if whole else top.total
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
