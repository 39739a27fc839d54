"""Whether two executors of one static INT8 model round to the same integers.

Given the same float input every integer has to be the same. End to end a model in float32, as training in
JAX is, parts from any other, however good both are: sums come in another order, a value on a rounding edge
falls to the other side, that integer moves the stream by far more than a float's last bit, and more of them
fall: in each layer about ten times as many as in the one before. So the ends are also compared with
everything but the integers in float64, where no edge is that near.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int8, Integer
from torch import Tensor

EQUAL_SHARE = 0.9999  # of all integers of all layers' inputs, in float64
LARGEST_STEP = 1


@runtime_checkable
class RoundsInputs(Protocol):
    """A model that shows what its quantized layers round."""

    def inputs(
        self, tokens: Integer[Tensor, "B T"], float64: bool = False
    ) -> dict[str, Float[Tensor, "N I"]]:
        """Return what enters each linear layer that rounds it, by name; float64: of all but the integers."""
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
      equal_share: share that is the same when each model makes its own inputs from the tokens, in float64.
      largest_step: largest difference of those that are not.
      float32_share: the same as each model runs.
      float32_step: the same as each model runs.
      float32_layers: float32_share of each layer.
    """

    weights: int
    weights_differing: int
    inputs: int
    same_input_differing: int
    equal_share: float
    largest_step: int
    float32_share: float
    float32_step: int
    float32_layers: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the two are one model, up to float noise."""
        exact = self.weights_differing == self.same_input_differing == 0
        return exact and self.equal_share >= EQUAL_SHARE and self.largest_step <= LARGEST_STEP

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"integers: {self.weights_differing} of {self.weights:,} weights and "
            f"{self.same_input_differing} of {self.inputs:,} inputs differ for the same floats; end to end "
            f"{self.equal_share:.4%} are equal in float64, the others at most {self.largest_step} "
            f"step(s) apart ({self.float32_share:.2%} and {self.float32_step} in float32)"
        )


def compare_integers(
    reference: object, model: object, tokens: Integer[Tensor, "B T"]
) -> IntegerComparison | None:
    """Compare the integers of two models; None unless both round inputs with scales of their own."""
    if not isinstance(reference, RoundsInputs) or not isinstance(model, RoundsInputs):
        return None
    theirs, ours = reference.inputs(tokens), model.inputs(tokens)
    names = [name for name in theirs if name in ours]  # layers may be left in float
    if not names:
        return None
    weights = weights_differing = same_input = 0
    for name in names:
        pair = reference.weight_integers(name), model.weight_integers(name)
        weights += pair[0].numel()
        weights_differing += int((pair[0] != pair[1]).sum())
        expected = reference.round_input(name, theirs[name])
        same_input += int((expected != model.round_input(name, theirs[name])).sum())
    inputs = sum(theirs[name].numel() for name in names)
    shares, step = _end_to_end(names, reference, model, theirs, ours)
    exact = reference.inputs(tokens, True), model.inputs(tokens, True)
    exact_shares, exact_step = _end_to_end(names, reference, model, *exact)
    sizes = {name: theirs[name].numel() / inputs for name in names}
    return IntegerComparison(
        weights,
        weights_differing,
        inputs,
        same_input,
        sum(sizes[name] * exact_shares[name] for name in names),
        exact_step,
        sum(sizes[name] * shares[name] for name in names),
        step,
        shares,
    )


def _end_to_end(
    names: Sequence[str],
    reference: RoundsInputs,
    model: RoundsInputs,
    theirs: dict[str, Tensor],
    ours: dict[str, Tensor],
) -> tuple[dict[str, float], int]:
    """Return the share of equal integers of each layer, and the largest difference."""
    shares, largest = {}, 0
    for name in names:
        steps = (reference.round_input(name, theirs[name]) - model.round_input(name, ours[name])).abs()
        shares[name] = float((steps == 0).double().mean())
        largest = max(largest, int(steps.max()))
    return shares, largest
