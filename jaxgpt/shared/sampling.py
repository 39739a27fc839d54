"""Choosing the next token from logits: one definition for the JAX and the PyTorch side.

Numpy in float64, one uniform number a token, so that the same seed draws alike from every engine and
samples of two models differ only where their distributions do.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p; 1 keeps all.
      seed: of the random numbers.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature ({self.temperature}) must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p ({self.top_p}) must lie in (0, 1]")
        if self.seed < 0:
            raise UserError(f"seed ({self.seed}) must not be negative")


class Sampler:
    """Draws tokens; one object a generated text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

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
        tokens, probabilities = _candidates(logits, self._sampling)
        cumulative = np.cumsum(probabilities)
        at = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(at), len(tokens) - 1)])


def _candidates(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the kept tokens, most probable first, and their probabilities (not renormalized)."""
    off = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 makes all but the largest -inf, as it should
        scaled = (off - off.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept = scaled[order]
    probabilities = np.exp(kept - kept[0])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        keep = int((before < sampling.top_p).sum())
        order, probabilities = order[:keep], probabilities[:keep]
    return order, probabilities
