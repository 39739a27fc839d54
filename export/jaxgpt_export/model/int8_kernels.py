"""Exact integer products of PyTorch, and the fastest of them for a shape.

The integer product runs in FBGEMM or oneDNN (int8 x int8 -> int32), through the operators that PyTorch's own
quantized models use, on a copy of the weights that they pack for this CPU, or in `torch._int_mm`. Which of
them is exact is checked once, on the extreme values (older CPUs add pairs of products in 16 bits and
saturate); of those each layer takes the fastest for its shape, one for generation and one for prompts.
"""

import functools
import math
import threading
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from jaxgpt_export.model.arithmetic import LEVELS

Product = Callable[[Tensor], Tensor]
FEW, MANY = 1, 64  # tokens for which kernels are compared
FEW_LIMIT = 8  # up to so many tokens the kernel for few is taken
_ENGINE = threading.Lock()  # PyTorch's choice of a quantized engine is one for all threads
TRIALS = 7  # timed calls of a kernel, the first of which prepares it
HOPELESS = 20  # times the fastest; a first call that takes so much longer is the last
PREPARING_S = 0.02  # a first call may take so long whatever the fastest takes


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


# Each takes integers in float32, as `model.arithmetic` rounds them, and returns their sums in float32.
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
    of _int_mm), on some CPUs for all of them: what is HOPELESS times slower is tried once. One that is exact
    elsewhere and not for this shape (_int_mm with one input) is left out.
    """
    weight = torch.ones(O, I, dtype=torch.int8)
    q = torch.ones(tokens, I)
    sums = torch.full((tokens, O), float(I))

    def seconds(product: Product) -> float:
        started = time.perf_counter()
        found = product(q)
        passed = time.perf_counter() - started
        return passed if torch.equal(found, sums) else math.inf

    products = {name: KERNELS[name](weight) for name in exact_kernels()}
    best = {name: seconds(product) for name, product in products.items()}
    bound = max(HOPELESS * min(best.values()), PREPARING_S)
    for name in [name for name, first in best.items() if first <= bound]:
        best[name] = min(best[name], *(seconds(products[name]) for _ in range(TRIALS - 1)))
    return min(best, key=lambda name: best[name])


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
