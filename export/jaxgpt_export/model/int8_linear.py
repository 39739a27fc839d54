"""A linear layer that runs real INT8 kernels."""

from typing import Any

import torch
from jaxtyping import Float, Int8, Int16, UInt8
from torch import Tensor, nn

from jaxgpt_export.model.arithmetic import (
    RESIDUAL_LEVELS,
    dequantize,
    quantize_residual,
    quantize_static,
    quantize_tokens,
)
from jaxgpt_export.model.int8_kernels import FEW, FEW_LIMIT, KERNELS, MANY, Product, fastest_kernel


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and int8 input; `model.arithmetic` defines what it computes.

    Attributes:
      weight: (O, I) int8; Int4Linear's two integers a byte.
      weight_scale: (O,).
      bias: (O,), or None.
      input_scale: () for static input; None for dynamic.
      smooth: (I,) by which the input is divided first; None for none.
      two_level: the residual of the input's rounding is rounded too, and multiplied in the same call.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        weight: Int8[Tensor, "O I"] | UInt8[Tensor, "O I2"],
        weight_scale: Float[Tensor, "O"],
        bias: Float[Tensor, "O"] | None = None,
        input_scale: Float[Tensor, ""] | None = None,
        smooth: Float[Tensor, "I"] | None = None,
        two_level: bool = False,
    ) -> None:
        super().__init__()
        self.two_level = two_level
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("smooth", smooth)
        self._prepare()

    def _prepare(self) -> None:
        """Derive from the buffers what forward uses: kernels hold packed copies of the weights."""
        self._products: dict[str, Product] = {}
        self._few = self._product(FEW)
        self._many: Product | None = None  # packed with the first prompt: some layers never see one
        scale = self.input_scale
        self._static_scale = None if scale is None else scale * self.weight_scale

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._prepare()

    def _apply(self, *arguments: Any, **keywords: Any) -> "Int8Linear":
        super()._apply(*arguments, **keywords)
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `_prepare` derives: packed weights are objects of this process and this CPU."""
        derived = ("_products", "_few", "_many", "_static_scale")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Derive it anew, in another process or on another CPU."""
        super().__setstate__(state)
        self._prepare()

    def _product(self, tokens: int) -> Product:
        name = fastest_kernel(*self.weight.shape, tokens)
        if name not in self._products:
            self._products[name] = KERNELS[name](self.weight)
        return self._products[name]

    def quantize_input(
        self, x: Float[Tensor, "*N I"]
    ) -> tuple[Float[Tensor, "*N I"], Float[Tensor, "*N 1"] | Float[Tensor, ""]]:
        """Return the integers of the input, in float32, and their scale."""
        return self._rounded(self._smoothed(x))

    def _smoothed(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N I"]:
        return x if self.smooth is None else x / self.smooth

    def _rounded(
        self, x: Float[Tensor, "*N I"]
    ) -> tuple[Float[Tensor, "*N I"], Float[Tensor, "*N 1"] | Float[Tensor, ""]]:
        if self.input_scale is None:
            return quantize_tokens(x)
        return quantize_static(x, self.input_scale), self.input_scale

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Apply the layer."""
        return self.compute(x, self._sums)

    def compute(self, x: Float[Tensor, "*N I"], product: Product) -> Float[Tensor, "*N O"]:
        """Apply the layer with a given product of integers."""
        x = self._smoothed(x)
        q, scale = self._rounded(x)
        if self.two_level:
            residual = quantize_residual(x, q, scale)
            sums, residual_sums = product(torch.stack([q, residual])).unbind()
            sums = residual_sums.div(RESIDUAL_LEVELS).add_(sums)
        else:
            sums = product(q)
        output_scale = scale * self.weight_scale if self._static_scale is None else self._static_scale
        y = sums.mul_(output_scale)
        return y if self.bias is None else y.add_(self.bias)

    def _sums(self, q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        if q.numel() <= FEW_LIMIT * q.shape[-1]:
            return self._few(q.float()).to(q.dtype)
        self._many = self._many or self._product(MANY)
        return self._many(q.float()).to(q.dtype)

    def integer_weight(self) -> Int8[Tensor, "O I"] | Int16[Tensor, "O I"]:
        """Return the integers that an input's integers are multiplied with."""
        return self.weight

    def plain_product(self, q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Return the sums of integers by torch._int_mm, from buffers alone: torch.export can store that."""
        sums = torch._int_mm(q.to(torch.int8).flatten(0, -2), self.weight.t())
        return sums.float().view(*q.shape[:-1], len(self.weight))

    def float_weight(self) -> Float[Tensor, "O I"]:
        """Return the weights in float32, as they act on an input that is not smoothed yet."""
        weight = dequantize(self.weight, self.weight_scale)
        return weight if self.smooth is None else weight / self.smooth

    def extra_repr(self) -> str:
        """Say what kind of layer it is."""
        inputs = "dynamic" if self.input_scale is None else "static"
        levels = ", two levels" if self.two_level else ""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, int8, {inputs} input{levels}"
