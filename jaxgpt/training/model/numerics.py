"""In which precision a model is computed, and by which kernels."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.shared.config import ModelConfig, TrainConfig

SUM_OVER_ROWS = re.compile("(.)(.),\\1(.)->\\2\\3")  # the equation of a gradient of weights
COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
FLASH_CAPABILITY = 8.0  # cuDNN's fused attention needs an A100 or newer
MAX_FLASH_HEAD_SIZE = 128


class Numerics(NamedTuple):
    """How a model is computed; a step that is traced asks nothing else of the device that it will run on.

    Attributes:
      params: dtype of parameters, residual stream, LayerNorm, softmax, logits.
      compute: dtype of inputs and weights of matrix products.
      flash: attention by cuDNN's fused kernel, which never writes the (T, T) weights; without a cache only.
      wide_sums: products of the compute dtype are summed in the parameters' dtype. XLA's CPU backend has no
        such product of float16.
      on_cpu: XLA's CPU backend will run it: gradients of weights are formed with the narrower side first, as
        it takes up to twice as long for the same sums the other way; its devices share the optimizer's work.
      low_precision_stream: see TrainConfig, as of the others.
      low_precision_logits: see TrainConfig.
      fused_layer_norm: see TrainConfig.
      fused_gelu: see TrainConfig.
      unfused_qkv: see TrainConfig.
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    flash: bool = False
    wide_sums: bool = True
    on_cpu: bool = False
    low_precision_stream: bool = False
    low_precision_logits: bool = False
    fused_layer_norm: bool = False
    fused_gelu: bool = False
    unfused_qkv: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether products are computed in another dtype than the parameters'."""
        return jnp.dtype(self.compute) != jnp.dtype(self.params)

    @property
    def stream(self) -> Any:
        """The dtype of the residual stream."""
        return self.compute if self.low_precision_stream else self.params

    @property
    def logits(self) -> Any:
        """The dtype of a training's logits."""
        return self.compute if self.low_precision_logits else self.params


FLOAT32 = Numerics()
TRAFFIC = ("low_precision_stream", "low_precision_logits", "fused_layer_norm", "fused_gelu", "unfused_qkv")


def choose_numerics(
    model: ModelConfig, train: TrainConfig, platform: str, capability: float
) -> tuple[Numerics, str]:
    """Decide how a model is trained on a device.

    Args:
      model: shape.
      train: precision of matrix products, and what else is computed in it.
      platform: of the device: cpu, gpu.
      capability: CUDA compute capability; 0 where there is none.

    Returns:
      The numerics, and why attention is flash or not.
    """
    size, precision = model.head_size, train.precision
    obstacles = {
        f"the device is a {platform}, no GPU": platform != "gpu",
        f"compute capability {capability} is below {FLASH_CAPABILITY}": platform == "gpu"
        and capability < FLASH_CAPABILITY,
        "precision is fp32": precision == "fp32",
        f"head size {size} is no multiple of 8 up to {MAX_FLASH_HEAD_SIZE}": size % 8 > 0
        or size > MAX_FLASH_HEAD_SIZE,
        f"block_size {model.block_size} is odd": model.block_size % 2 > 0,
        "dropout acts on attention weights": model.attn_rate > 0,
    }
    found = [text for text, true in obstacles.items() if true]
    reason = f"attention by XLA ({found[0]})" if found else "flash attention by cuDNN"
    wide_sums = not (platform == "cpu" and precision == "fp16")
    numerics = Numerics(
        compute=COMPUTE_DTYPES[precision], flash=not found, wide_sums=wide_sums, on_cpu=platform == "cpu"
    )
    if numerics.is_mixed:
        numerics = numerics._replace(**{name: getattr(train, name) for name in TRAFFIC})
    return numerics, reason


def matmul(
    equation: str, a: Float[Array, "..."], b: Float[Array, "..."], numerics: Numerics, out: Any = None
) -> Array:
    """Multiply in the compute dtype and sum in the parameters' dtype, forward and backward.

    A product of bfloat16 operands with float32 sums has a float32 cotangent, and JAX's own transpose of it
    multiplies float32: in TF32 on a Hopper, in plain float32 on a T4. Here the cotangent is cast to the
    compute dtype for the two backward products, whose results have the dtypes of a and b.

    Args:
      equation: einsum's, such as "NC,VC->NV"; each letter of an operand is in the other one or in the result.
      a: first operand, in any float dtype.
      b: second operand.
      numerics: of the product.
      out: dtype of the result; the parameters' if not given.
    """
    out = numerics.params if out is None else out
    if not numerics.is_mixed and not numerics.on_cpu:
        return _product(equation, a, b, numerics, out)
    return _matmul(_Matmul(equation, numerics, out, a.dtype, b.dtype), a, b)


class _Matmul(NamedTuple):
    """What is known of a product before its operands.

    Attributes:
      equation: einsum's.
      numerics: of the product.
      out: dtype of the result.
      a_dtype: dtype of the first operand, and of its gradient.
      b_dtype: the same of the second.
    """

    equation: str
    numerics: Numerics
    out: Any
    a_dtype: Any
    b_dtype: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: _Matmul, a: Array, b: Array) -> Array:
    return _product(how.equation, a, b, how.numerics, how.out)


def _matmul_forward(how: _Matmul, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    compute = how.numerics.compute
    return _matmul(how, a, b), (a.astype(compute), b.astype(compute))


def _matmul_backward(how: _Matmul, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = kept
    operands, result = how.equation.split("->")
    first, second = operands.split(",")
    of_a = _product(f"{result},{second}->{first}", gradient, b, how.numerics, how.a_dtype)
    of_b = _product(f"{first},{result}->{second}", a, gradient, how.numerics, how.b_dtype)
    return of_a, of_b


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(equation: str, a: Array, b: Array, numerics: Numerics, out: Any) -> Array:
    """Multiply in the compute dtype; the sums are as wide as `out` and numerics.wide_sums let them be."""
    operands = a.astype(numerics.compute), b.astype(numerics.compute)
    sums = out if numerics.wide_sums else None
    if not (numerics.on_cpu and SUM_OVER_ROWS.fullmatch(equation)):
        return jnp.einsum(equation, *operands, preferred_element_type=sums).astype(out)
    wide_first = a.shape[1] > b.shape[1]
    if wide_first:
        operands = operands[::-1]
    # Without the barrier XLA would put the sides in an order of its own.
    found = jnp.einsum("NI,NO->IO", *operands, preferred_element_type=sums).astype(out)
    found = jax.lax.optimization_barrier(found)
    return found.T if wide_first else found
