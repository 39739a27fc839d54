"""A linear layer with 4-bit weights and INT8 input."""

from typing import Any

import torch
from jaxtyping import Float, Int8, Int16, UInt8
from torch import Tensor

from jaxgpt_export.model.arithmetic import dequantize, integer_weights
from jaxgpt_export.model.int8_linear import Int8Linear

EIGHTS = 8  # a weight times its factor is 8 high + low, each of 8 bits


class Int4Linear(Int8Linear):
    """A linear layer with int4 weights, groups of which have factors; see `model.arithmetic`.

    Integers times factors are two matrices of 8 bits, whose exact int32 sums are added: right, and no faster
    than 8 bits. The native engine multiplies the 4 bits.

    Attributes:
      weight: (O, I / 2) uint8, 4-bit integers.
      group_factor: (O, I / G) int8.
    """

    group_factor: Tensor

    def __init__(
        self,
        weight: UInt8[Tensor, "O I2"],
        weight_scale: Float[Tensor, "O"],
        group_factor: Int8[Tensor, "O groups"],
        bias: Float[Tensor, "O"] | None = None,
        input_scale: Float[Tensor, ""] | None = None,
        smooth: Float[Tensor, "I"] | None = None,
        two_level: bool = False,
    ) -> None:
        super().__init__(weight, weight_scale, bias, input_scale, smooth, two_level)
        self.register_buffer("group_factor", group_factor)
        self._prepare()

    def _prepare(self) -> None:
        if "group_factor" not in self._buffers:
            return  # Int8Linear's __init__ calls it before there is one
        self._high, self._low = self._halves()
        scale = self.input_scale
        self._static_scale = None if scale is None else scale * self.weight_scale

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `_prepare` derives."""
        derived = ("_high", "_low", "_static_scale")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def _halves(self) -> tuple[Int8[Tensor, "O I"], Int8[Tensor, "O I"]]:
        whole = self.integer_weight()
        high = (whole + EIGHTS // 2) >> 3
        return high.to(torch.int8), (whole - EIGHTS * high).to(torch.int8)

    def _sums(self, q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        return _sums_of_halves(q, self._high, self._low)

    def integer_weight(self) -> Int16[Tensor, "O I"]:
        """Return the integers times their groups' factors, in [-1016, 1016]."""
        return integer_weights(self.weight, self.group_factor)

    def plain_product(self, q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Return the sums of integers by torch._int_mm, from the buffers alone."""
        return _sums_of_halves(q, *self._halves())

    def float_weight(self) -> Float[Tensor, "O I"]:
        """Return the weights in float32, as they act on an input that is not smoothed yet."""
        weight = dequantize(self.weight, self.weight_scale, self.group_factor)
        return weight if self.smooth is None else weight / self.smooth

    def extra_repr(self) -> str:
        """Say what kind of layer it is."""
        inputs = "dynamic" if self.input_scale is None else "static"
        levels = ", two levels" if self.two_level else ""
        return f"{self._high.shape[1]}, {len(self.weight)}, int4, {inputs} input{levels}"


def _sums_of_halves(
    q: Float[Tensor, "*N I"], high: Int8[Tensor, "O I"], low: Int8[Tensor, "O I"]
) -> Float[Tensor, "*N O"]:
    rows = q.to(torch.int8).flatten(0, -2)
    sums = EIGHTS * torch._int_mm(rows, high.t()) + torch._int_mm(rows, low.t())
    return sums.to(q.dtype).view(*q.shape[:-1], len(high))
