"""Quantized layers: INT8 ones that run real INT8 kernels, and weight-only ones.

The integer product runs in FBGEMM or oneDNN (int8 x int8 -> int32), through the operators that PyTorch's own
quantized models use, on a copy of the weights that they pack for this CPU, or in `torch._int_mm`. Which of
them is exact is checked once, on the extreme values (older CPUs add pairs of products in 16 bits and
saturate); of those each layer takes the fastest for its shape, one for generation and one for prompts.

Weight-only layers keep their input float and multiply in float32: smaller files, no faster module.
"""

import functools
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from export.arithmetic import (
    FINE_LEVELS,
    LEVELS,
    dequantize,
    quantize_rest,
    quantize_static,
    quantize_tokens,
)

Product = Callable[[Tensor], Tensor]
FEW, MANY = 1, 64  # tokens for which kernels are compared
FEW_LIMIT = 8  # up to so many tokens the kernel for few is taken
_ENGINE = threading.Lock()  # PyTorch's choice of a quantized engine is one for all threads
TRIALS = 7  # timed calls of a kernel, the first of which prepares it


def _fbgemm_product(weight: Int8[Tensor, "O I"]) -> Product:
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings(), _ENGINE:
        warnings.simplefilter("ignore")  # PyTorch says that the class of quantized tensors will go
        tensor = torch._make_per_channel_quantized_tensor(weight, ones, zeros, 0)
        engine = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm"
            packed = torch.ops.quantized.linear_prepack(tensor, None)
        finally:
            torch.backends.quantized.engine = engine
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def product(q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        # Step 1 and zero point 128: the integers become unsigned bytes and the result is the sum.
        return operator(q, 1.0, 128, packed)

    return product


def _onednn_product(weight: Int8[Tensor, "O I"]) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    one, zero = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    operator = torch.ops.onednn.qlinear_pointwise.default

    def product(q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        # Steps of 1 and no zero points: the result is the int32 sum, converted to float32.
        return operator(
            q.to(torch.int8), 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return product


def _int_mm_product(weight: Int8[Tensor, "O I"]) -> Product:
    transposed = weight.t()

    def product(q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        sums = torch._int_mm(q.to(torch.int8).view(-1, q.shape[-1]), transposed)
        return sums.float().view(*q.shape[:-1], -1)

    return product


# Each takes integers in float32, as `export.arithmetic` rounds them, and returns their sums in float32.
KERNELS: dict[str, Callable[[Tensor], Product]] = {
    "fbgemm": _fbgemm_product,
    "onednn": _onednn_product,
    "int_mm": _int_mm_product,
}


@functools.cache
def exact_kernels() -> tuple[str, ...]:
    """Return the INT8 kernels that give exact sums on this machine.

    Raises:
      RuntimeError: none does.
    """
    found = []
    for name, make in KERNELS.items():
        try:
            if is_exact(make):
                found.append(name)
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    if not found:
        raise RuntimeError(f"no INT8 kernel of PyTorch {torch.__version__} gives exact sums on this CPU")
    return tuple(found)


@functools.cache
def fastest_kernel(O: int, I: int, tokens: int) -> str:
    """Return the exact kernel that is fastest for so many tokens and a weight of this shape, by trying.

    None is best everywhere: for one token FBGEMM takes 0.7 of oneDNN's time on GPT-2's matrices, for 64
    tokens twice as much; oneDNN falls back to a loop for some small ones (128 x 512: 1800 us against 11 us
    of _int_mm).
    """
    weight = torch.ones(O, I, dtype=torch.int8)
    q = torch.ones(tokens, I)

    def seconds(name: str) -> float:
        product = KERNELS[name](weight)
        best = float("inf")
        for _ in range(TRIALS):
            started = time.perf_counter()
            product(q)
            best = min(best, time.perf_counter() - started)
        return best

    return min(exact_kernels(), key=seconds)


def is_exact(make: Callable[[Tensor], Product]) -> bool:
    """Whether a kernel gives the exact sums of extreme and random values, for one token and for many."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-LEVELS, LEVELS + 1, (64, 256), generator=generator, dtype=torch.int8)
    extreme = torch.full((64, 256), LEVELS, dtype=torch.int8)
    extreme[::2] = -LEVELS
    for weight in (random, extreme):
        product = make(weight)
        for q in (random[:1], random[:33], extreme[:2], extreme[1:2]):
            exact = (q.long() @ weight.long().t()).float()
            if not torch.equal(product(q.float()), exact):
                return False
    return True


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and int8 input; `export.arithmetic` defines what it computes.

    Attributes:
      weight: (O, I) int8.
      weight_scale: (O,).
      bias: (O,), or None.
      input_scale: () for static input; None for dynamic.
      smooth: (I,) by which the input is divided first; None for none.
      fine: what rounding the input leaves is rounded too, and multiplied in the same call.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        weight: Int8[Tensor, "O I"],
        weight_scale: Float[Tensor, "O"],
        bias: Float[Tensor, "O"] | None = None,
        input_scale: Float[Tensor, ""] | None = None,
        smooth: Float[Tensor, "I"] | None = None,
        fine: bool = False,
    ) -> None:
        super().__init__()
        self.fine = fine
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

    def _product(self, tokens: int) -> Product:
        name = fastest_kernel(*self.weight.shape, tokens)
        if name not in self._products:
            self._products[name] = KERNELS[name](self.weight)
        return self._products[name]

    def quantize_input(
        self, x: Float[Tensor, "*N I"]
    ) -> tuple[Float[Tensor, "*N I"], Float[Tensor, "*N 1"] | Float[Tensor, ""]]:
        """Return the integers of the input, in float32, and their step."""
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
        if self.fine:
            rest = quantize_rest(x, q, scale)
            sums, fine_sums = product(torch.stack([q, rest])).unbind()
            sums = fine_sums.div(FINE_LEVELS).add_(sums)
        else:
            sums = product(q)
        step = scale * self.weight_scale if self._static_scale is None else self._static_scale
        y = sums.mul_(step)
        return y if self.bias is None else y.add_(self.bias)

    def _sums(self, q: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        if q.numel() <= FEW_LIMIT * q.shape[-1]:
            return self._few(q.float()).to(q.dtype)
        self._many = self._many or self._product(MANY)
        return self._many(q.float()).to(q.dtype)

    def float_weight(self) -> Float[Tensor, "O I"]:
        """Return the weights in float32, as they act on an input that is not smoothed yet."""
        weight = dequantize(self.weight, self.weight_scale)
        return weight if self.smooth is None else weight / self.smooth

    def extra_repr(self) -> str:
        """Say what kind of layer it is."""
        inputs = "dynamic" if self.input_scale is None else "static"
        fine = ", fine" if self.fine else ""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, int8, {inputs} input{fine}"


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are integers with steps of their own.

    Attributes:
      weight: (V, C) int8, or (V, C / 2) uint8 with 4-bit integers; the head uses the same tensor.
      weight_scale: (V,) float32, or (V, C / G) bfloat16.
      smooth: (C,) by which a row is divided; None unless the head is smoothed.
    """

    weight: Tensor
    weight_scale: Tensor
    smooth: Tensor | None

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, smooth: Float[Tensor, "C"] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("smooth", smooth)

    def forward(self, tokens: Integer[Tensor, "*N"]) -> Float[Tensor, "*N C"]:
        """Return the rows of tokens as float32."""
        return self._floats(F.embedding(tokens, self.weight), self.weight_scale[tokens])

    def float_weight(self) -> Float[Tensor, "V C"]:
        """Return all rows as float32."""
        return self._floats(self.weight, self.weight_scale)

    def _floats(self, weight: Tensor, scale: Tensor) -> Float[Tensor, "*N C"]:
        rows = dequantize(weight, scale)
        return rows if self.smooth is None else rows / self.smooth


class WeightOnlyLinear(nn.Module):
    """A linear layer with rounded weights and float input; `export.arithmetic` defines what it computes.

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
