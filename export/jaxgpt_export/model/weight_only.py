"""Layers whose weights alone are rounded; their input stays float and they multiply in float32.

Smaller files, no faster module.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt_export.model.arithmetic import dequantize


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are integers with scales of their own.

    Attributes:
      weight: (V, C) int8, or (V, C / 2) uint8 with 4-bit integers; the head uses the same tensor.
      weight_scale: (V,) float32, or (V, C / G) bfloat16.
      smooth: (C,) by which a row is divided; None unless the head is smoothed.
      group_factor: (V, C / G) int8, of 4-bit integers whose scales are those of rows; else None.
    """

    weight: Tensor
    weight_scale: Tensor
    smooth: Tensor | None
    group_factor: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        smooth: Float[Tensor, "C"] | None = None,
        group_factor: Int8[Tensor, "V groups"] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("smooth", smooth)
        self.register_buffer("group_factor", group_factor)

    def forward(self, tokens: Integer[Tensor, "*N"]) -> Float[Tensor, "*N C"]:
        """Return the rows of tokens as float32."""
        factor = None if self.group_factor is None else self.group_factor[tokens]
        return self._floats(F.embedding(tokens, self.weight), self.weight_scale[tokens], factor)

    def float_weight(self) -> Float[Tensor, "V C"]:
        """Return all rows as float32."""
        return self._floats(self.weight, self.weight_scale, self.group_factor)

    def _floats(self, weight: Tensor, scale: Tensor, factor: Tensor | None) -> Float[Tensor, "*N C"]:
        rows = dequantize(weight, scale, factor)
        return rows if self.smooth is None else rows / self.smooth


class WeightOnlyLinear(nn.Module):
    """A linear layer with rounded weights and float input; `model.arithmetic` defines what it computes.

    The float32 weights are formed once. PyTorch's own weight-only kernels would not do: in float32 they take
    1.7 (int8) and 6 (int4) times a float product's time for one token, in bfloat16 they round the input.

    Attributes:
      weight: (O, I) int8, or (O, I / 2) uint8 with 4-bit integers.
      weight_scale: (O,) float32, or (O, I / G) bfloat16.
      bias: (O,), or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Float[Tensor, "O"] | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self._float = self.float_weight()

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._float = self.float_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightOnlyLinear":
        super()._apply(fn, recurse)
        self._float = fn(self._float)
        return self

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Apply the layer."""
        return F.linear(x, self._float, self.bias)

    def float_weight(self) -> Float[Tensor, "O I"]:
        """Return the weights in float32."""
        return dequantize(self.weight, self.weight_scale)

    def extra_repr(self) -> str:
        """Say what kind of layer it is."""
        bits = 8 if self.weight.dtype == torch.int8 else 4
        return f"{self._float.shape[1]}, {len(self.weight)}, int{bits} weights, float input"
