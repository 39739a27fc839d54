"""Whether two executors of one static INT8 model round to the same integers.

Given the same float input every integer has to be the same. End to end float sums come in another order, so
that a value on a rounding edge may fall to either side: by one step, and seldom.
"""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int8, Integer
from torch import Tensor

# Of all integers of all layers' inputs; float noise of 1e-6 of a layer's largest input turns about 1 in 10^4.
EQUAL_SHARE = 0.9999
LARGEST_STEP = 1


@runtime_checkable
class RoundsInputs(Protocol):
    """A model that shows what its quantized layers round."""

    def inputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N I"]]:
        """Return what enters each linear layer that rounds it, by name."""
        ...

    def round_input(self, layer: str, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Return the integers that a layer makes of an input."""
        ...

    def weight_integers(self, layer: str) -> Int8[Tensor, "O I"]:
        """Return the integers of a layer's weights."""
        ...


@dataclasses.dataclass(frozen=True)
class IntegerComparison:
    """Integers of a model against those of a reference.

    Attributes:
      weights: number compared.
      weights_differing: how many are not the same.
      inputs: number compared.
      same_input_differing: how many are not the same when both round the reference's float inputs.
      equal_share: share that is the same when each model makes its own inputs from the tokens.
      largest_step: largest difference of those that are not.
      layers: equal_share of each layer.
    """

    weights: int
    weights_differing: int
    inputs: int
    same_input_differing: int
    equal_share: float
    largest_step: int
    layers: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the two are one model, up to float noise."""
        exact = self.weights_differing == self.same_input_differing == 0
        return exact and self.equal_share >= EQUAL_SHARE and self.largest_step <= LARGEST_STEP

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"integers: {self.weights_differing} of {self.weights:,} weights and {self.same_input_differing} "
            f"of {self.inputs:,} inputs differ for the same floats; end to end {self.equal_share:.4%} of the "
            f"inputs are equal, the others at most {self.largest_step} step(s) apart"
        )


def compare_integers(
    reference: object, model: object, tokens: Integer[Tensor, "B T"]
) -> IntegerComparison | None:
    """Compare the integers of two models; None unless both round inputs with steps of their own."""
    if not isinstance(reference, RoundsInputs) or not isinstance(model, RoundsInputs):
        return None
    theirs, ours = reference.inputs(tokens), model.inputs(tokens)
    names = [name for name in theirs if name in ours]
    if not names:
        return None
    weights = weights_differing = inputs = same_input = equal = largest = 0
    layers = {}
    for name in names:
        pair = reference.weight_integers(name), model.weight_integers(name)
        weights += pair[0].numel()
        weights_differing += int((pair[0] != pair[1]).sum())
        expected = reference.round_input(name, theirs[name])
        same_input += int((expected != model.round_input(name, theirs[name])).sum())
        steps = (expected - model.round_input(name, ours[name])).abs()
        inputs += steps.numel()
        same = int((steps == 0).sum())
        equal += same
        layers[name] = same / steps.numel()
        largest = max(largest, int(steps.max()))
    return IntegerComparison(weights, weights_differing, inputs, same_input, equal / inputs, largest, layers)
