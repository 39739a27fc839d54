"""What a model must show to be compared."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Integer
from torch import Tensor


@runtime_checkable
class Comparable(Protocol):
    """A model that can be compared.

    Attributes:
      name: for messages.
      quantized: whether it rounds, so that layers may differ by more than float sums do.
      block_size: longest context, tokens; None where it does not say.
    """

    name: str
    quantized: bool
    block_size: int | None

    def logits(self, tokens: Integer[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of every position."""
        ...

    def outputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N O"]]:
        """Return what each layer puts out, by GPT-2's name, in the order of the computation.

        Points that a model scales on purpose (smoothing that is folded into its weights) are left out.
        """
        ...

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the float weight (O, I) and bias (O,) of a layer, where it has them."""
        ...
