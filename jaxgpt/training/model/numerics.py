"""In which precision a model is computed, and by which kernels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.shared.config import ModelConfig, Precision

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
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    flash: bool = False
    wide_sums: bool = True


FLOAT32 = Numerics()


def choose_numerics(
    model: ModelConfig, precision: Precision, platform: str, capability: float
) -> tuple[Numerics, str]:
    """Decide how a model is trained on a device.

    Args:
      model: shape.
      precision: of matrix products.
      platform: of the device: cpu, gpu.
      capability: CUDA compute capability; 0 where there is none.

    Returns:
      The numerics, and why attention is flash or not.
    """
    size = model.head_size
    obstacles = {
        f"the device is a {platform}, no GPU": platform != "gpu",
        f"compute capability {capability} is below {FLASH_CAPABILITY}": platform == "gpu"
        and capability < FLASH_CAPABILITY,
        "precision is fp32": precision == "fp32",
        f"head size {size} is no multiple of 8 up to {MAX_FLASH_HEAD_SIZE}": size % 8 > 0
        or size > MAX_FLASH_HEAD_SIZE,
        f"block_size {model.block_size} is odd": model.block_size % 2 > 0,
        "dropout acts on attention weights": model.dropout > 0,
    }
    found = [text for text, true in obstacles.items() if true]
    reason = f"attention by XLA ({found[0]})" if found else "flash attention by cuDNN"
    wide_sums = not (platform == "cpu" and precision == "fp16")
    numerics = Numerics(compute=COMPUTE_DTYPES[precision], flash=not found, wide_sums=wide_sums)
    return numerics, reason


def matmul(equation: str, a: Float[Array, "..."], b: Float[Array, "..."], numerics: Numerics) -> Array:
    """Multiply in the compute dtype, sum and return in the parameters' dtype."""
    out = numerics.params if numerics.wide_sums else None
    product = jnp.einsum(
        equation, a.astype(numerics.compute), b.astype(numerics.compute), preferred_element_type=out
    )
    return product.astype(numerics.params)
