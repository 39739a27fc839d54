"""In which precision a model is computed, and by which kernels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Numerics(NamedTuple):
    """How it is computed.

    Attributes:
      params: dtype of parameters, residual stream, LayerNorm, softmax, logits.
      compute: dtype of inputs and weights of matrix products.
      flash: attention by cuDNN's fused kernel, which never writes the (T, T) weights; without a cache only.
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    flash: bool = False


FLOAT32 = Numerics()


def matmul(equation: str, a: Float[Array, "..."], b: Float[Array, "..."], numerics: Numerics) -> Array:
    """Multiply in the compute dtype, sum and return in the parameters' dtype."""
    # XLA's CPU backend has no float16 product with float32 sums; only tests compute so there.
    emulated = numerics.compute == jnp.float16 and jax.default_backend() == "cpu"
    out = None if emulated else numerics.params
    product = jnp.einsum(
        equation, a.astype(numerics.compute), b.astype(numerics.compute), preferred_element_type=out
    )
    return product.astype(numerics.params)
