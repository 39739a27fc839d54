"""Two models on the same tokens: as a whole, and layer by layer."""

import dataclasses

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from export.parity.metrics import Parity, ParityMeter
from export.parity.models import Comparable

# RMS error of a layer's output over its RMS. Float sums in another order: 1e-6 to 1e-5. INT8: 0.01 to 0.1
# in good models; a layer with permuted or wrongly scaled weights: about 1 and more.
FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same tokens.

    Attributes:
      parity: distance of the logits.
      reference_loss: nats per token.
      loss: nats per token.
      greedy_parts_at: first generated token at which the greedy texts differ; None when none does.
      greedy_tokens: how many were generated.
    """

    parity: Parity
    reference_loss: float
    loss: float
    greedy_parts_at: int | None
    greedy_tokens: int

    @property
    def loss_increase(self) -> float:
        """Loss above the reference's, nats per token."""
        return self.loss - self.reference_loss


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The first layer that computes something else.

    Attributes:
      layer: its name, such as h.3.attn.c_attn.
      tensor: the part whose values are furthest apart (weight or bias); None where they are alike.
      error: RMS error of the layer's output over the RMS of the reference's.
      before: the largest such error of the layers before it.
      tolerance: that errors were held against.
    """

    layer: str
    tensor: str | None
    error: float
    before: float
    tolerance: float

    def __str__(self) -> str:
        """Say it in one line."""
        named = f"{self.layer}.{self.tensor}" if self.tensor else f"{self.layer} (its tensors are alike)"
        return (
            f"the first layer that deviates is {self.layer}: relative error {self.error:.2g} (tolerance "
            f"{self.tolerance:.2g}; largest before it {self.before:.2g}); look at {named}"
        )


def compare_models(
    reference: Comparable, model: Comparable, tokens: Integer[Tensor, "B T"], greedy_tokens: int = 0
) -> Comparison:
    """Compare two models on tokens; every position but the last predicts the next token.

    Args:
      reference: what is held to be right.
      model: what is compared with it.
      tokens: (B, T), T > 1.
      greedy_tokens: also continue the first half of each row greedily with both, by so many tokens.

    Raises:
      UserError: the vocabularies differ, or logits are not finite.
    """
    for each in (reference, model):
        if each.block_size is not None and tokens.shape[1] > each.block_size:
            raise UserError(f"{tokens.shape[1]} tokens a row were given, {each.name} holds {each.block_size}")
    meter, losses = ParityMeter(), [0.0, 0.0]  # of the reference, of the model
    for row in tokens:  # one at a time: float64 copies of all logits would take gigabytes
        expected, found = reference.logits(row[None])[0], model.logits(row[None])[0]
        if expected.shape != found.shape:
            raise UserError(
                f"{reference.name} gives logits {tuple(expected.shape)}, {model.name} {tuple(found.shape)}: "
                "they have different vocabularies"
            )
        meter.add(expected, found)
        for index, logits in enumerate((expected, found)):
            loss = F.cross_entropy(logits[:-1].double(), row[1:].long(), reduction="sum")
            losses[index] += float(loss) / tokens[:, 1:].numel()
    parts_at = greedy_parting(reference, model, tokens, greedy_tokens) if greedy_tokens else None
    return Comparison(meter.result(), losses[0], losses[1], parts_at, greedy_tokens)


def greedy_parting(
    reference: Comparable, model: Comparable, tokens: Integer[Tensor, "B T"], count: int
) -> int | None:
    """Continue the first half of each row greedily; return the first step at which any two rows differ."""
    start = max(tokens.shape[1] // 2, 1)
    texts = tokens[:, :start]
    for step in range(count):
        room = texts[:, -tokens.shape[1] :]
        theirs, ours = reference.logits(room)[:, -1].argmax(-1), model.logits(room)[:, -1].argmax(-1)
        if not torch.equal(theirs, ours):
            return step
        texts = torch.cat([texts, theirs[:, None].to(texts.dtype)], dim=1)
    return None


def layer_errors(
    reference: Comparable, model: Comparable, tokens: Integer[Tensor, "B T"]
) -> dict[str, float]:
    """Return the relative RMS error of every layer's output that both models show, in order."""
    expected, found = reference.outputs(tokens), model.outputs(tokens)
    errors = {}
    for name, rows in found.items():
        if name not in expected:
            continue
        other = expected[name][:, : rows.shape[1]]
        if other.shape != rows.shape:
            raise UserError(
                f"{name} puts out {tuple(other.shape)} in {reference.name}, "
                f"{tuple(rows.shape)} in {model.name}"
            )
        errors[name] = _relative(rows, other)
    return errors


def first_deviation(
    reference: Comparable,
    model: Comparable,
    tokens: Integer[Tensor, "B T"],
    tolerance: float | None = None,
) -> Deviation | None:
    """Find the first layer whose output differs by more than rounding; None when there is none.

    Args:
      reference: what is held to be right.
      model: what is compared with it.
      tokens: a few rows suffice.
      tolerance: relative RMS error; by default 1e-3, or 0.3 where one of the two is quantized.
    """
    quantized = reference.quantized or model.quantized
    limit = tolerance if tolerance is not None else QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE
    before = 0.0
    for name, error in layer_errors(reference, model, tokens).items():
        if not error <= limit:  # NaN deviates
            return Deviation(name, _worst_tensor(reference, model, name), error, before, limit)
        before = max(before, error)
    return None


def _worst_tensor(reference: Comparable, model: Comparable, layer: str) -> str | None:
    theirs, ours = reference.tensors(layer), model.tensors(layer)
    errors = {
        part: _relative(ours[part], theirs[part]) if ours[part].shape == theirs[part].shape else float("inf")
        for part in theirs.keys() & ours.keys()
    }
    worst = max(errors, key=lambda part: errors[part], default=None)
    quantized = reference.quantized or model.quantized
    alike = QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE
    return worst if worst is not None and errors[worst] > alike else None


def _relative(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    difference = (found.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-30))
