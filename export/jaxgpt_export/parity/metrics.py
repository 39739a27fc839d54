"""How far one model's logits are from another's."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor
from torch.nn import functional as F

MAX_POSITIONS = 512  # of whose logits float64 copies are held at a time: 0.2 GB each with GPT-2's vocabulary


@dataclasses.dataclass(frozen=True)
class Parity:
    """The distance of logits from reference logits, over positions.

    Attributes:
      max_abs_logit_diff: largest |difference| of a logit.
      mean_abs_logit_diff: mean |difference|.
      kl_mean: mean over positions of KL(reference || other), nats.
      kl_max: its largest value.
      top1_agreement: share of positions with the same most probable token.
    """

    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    kl_mean: float
    kl_max: float
    top1_agreement: float


class Scores:
    """Logits of some positions, with what comparisons and losses need of them: computed once, in float64.

    Args:
      logits: (N, V), N > 0.

    Raises:
      UserError: NaN or infinity, which would pass every comparison.
    """

    def __init__(self, logits: Float[Tensor, "N V"]) -> None:
        if not bool(torch.isfinite(logits).all()):
            raise UserError("logits hold NaN or infinity: the model's weights are damaged or far too large")
        self.logits = logits
        self.log_probs: Float64[Tensor, "N V"] = F.log_softmax(logits.double(), dim=-1)

    @functools.cached_property
    def probs(self) -> Float64[Tensor, "N V"]:
        """Probabilities (N, V)."""
        return self.log_probs.exp()

    @functools.cached_property
    def top(self) -> Integer[Tensor, "N"]:
        """The most probable token of each position (N,)."""
        return self.logits.argmax(dim=-1)

    def losses(self, targets: Integer[Tensor, "N"]) -> Float64[Tensor, "N"]:
        """Return the cross entropy of each position, nats; see `token_losses`."""
        return F.nll_loss(self.log_probs, targets.long(), reduction="none")


class Differences(NamedTuple):
    """What differs between the scores of some positions and those of a reference.

    Attributes:
      kl: (N,), KL(reference || other), nats.
      same_top: (N,), whether both have the same most probable token.
      largest: |difference| of a logit.
      total: the sum of |differences|.
      logits: N V, how many were compared.
    """

    kl: Float64[Tensor, "N"]
    same_top: Bool[Tensor, "N"]
    largest: float
    total: float
    logits: int


def differences(reference: Scores, other: Scores) -> Differences:
    """Compare the scores of the same positions."""
    diff = (reference.logits.double() - other.logits.double()).abs()
    kl = (reference.probs * (reference.log_probs - other.log_probs)).sum(dim=-1)
    same_top = reference.top == other.top
    return Differences(kl, same_top, float(diff.max()), float(diff.sum()), diff.numel())


def pieces(positions: int) -> Iterator[slice]:
    """Cut so many positions into pieces of at most MAX_POSITIONS, alike in size."""
    count = max(-(-positions // MAX_POSITIONS), 1)
    for index in range(count):
        yield slice(positions * index // count, positions * (index + 1) // count)


class ParityMeter:
    """Gathers `Parity` over several batches of positions."""

    def __init__(self) -> None:
        self._max = self._sum = self._kl_sum = self._kl_max = 0.0
        self._logits = self._positions = self._agree = 0

    def add(self, reference: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> None:
        """Take the logits of some positions; computed in float64, piece by piece.

        Args:
          reference: (N, V), N > 0.
          other: (N, V).

        Raises:
          UserError: NaN or infinity, which would pass every comparison.
        """
        self.add_differences(
            [differences(Scores(reference[piece]), Scores(other[piece])) for piece in pieces(len(reference))]
        )

    def add_differences(self, found: Sequence[Differences]) -> tuple[Float64[Tensor, "N"], Bool[Tensor, "N"]]:
        """Take what differs at a batch of positions, in pieces one after the other.

        Returns:
          kl: KL(reference || other) of each position, nats.
          same_top: whether both have the same most probable token there.
        """
        kl, same_top = torch.cat([each.kl for each in found]), torch.cat([each.same_top for each in found])
        self._max = max(self._max, *(each.largest for each in found))
        self._sum += sum(each.total for each in found)
        self._logits += sum(each.logits for each in found)
        self._kl_sum += float(kl.sum())
        self._kl_max = max(self._kl_max, float(kl.max()))
        self._agree += int(same_top.sum())
        self._positions += len(kl)
        return kl, same_top

    def result(self) -> Parity:
        """Return what was gathered; at least one position."""
        return Parity(
            self._max,
            self._sum / self._logits,
            self._kl_sum / self._positions,
            self._kl_max,
            self._agree / self._positions,
        )


def token_losses(logits: Float[Tensor, "N V"], targets: Integer[Tensor, "N"]) -> Float64[Tensor, "N"]:
    """Return the cross entropy of each position, nats, computed in float64."""
    return F.cross_entropy(logits.double(), targets.long(), reduction="none")


def compare(reference: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> Parity:
    """Compare the logits of the same positions."""
    meter = ParityMeter()
    meter.add(reference, other)
    return meter.result()
