"""Two models layer by layer: where the first one deviates."""

import dataclasses

from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Integer
from torch import Tensor

from jaxgpt_export.parity.comparable import Comparable

# RMS error of a layer's output over its RMS. Float sums in another order: 1e-6 to 1e-5. INT8: 0.01 to 0.1
# in good models; a layer with permuted or wrongly scaled weights: about 1 and more.
FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.3


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
