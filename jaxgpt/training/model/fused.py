"""LayerNorm and GELU that compute in float32 and keep little but their input for the backward pass.

JAX's own gradients keep what they meet on the way (the centred input, the tanh), which a GPU writes to memory
and reads again. Here each backward pass computes it once more from the input, behind a barrier: or XLA would
see that it is the same as in the forward pass, and keep it.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.shared.architecture import LAYER_NORM_EPSILON

GELU_FACTOR, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*N C"], scale: Float[Array, "C"], bias: Float[Array, "C"], out: Any
) -> Float[Array, "*N C"]:
    """Normalize over the channels, in the dtype of scale and bias, which is that of their gradients.

    Args:
      x: in any float dtype.
      scale: gain.
      bias: offset.
      out: dtype of the result.
    """
    return _layer_norm_forward(x, scale, bias, out)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, out: Any) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(scale.dtype)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean((wide - mean) ** 2, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    axes = tuple(range(x.ndim - 1))
    y = (wide - mean) * inverse * jnp.expand_dims(scale, axes) + jnp.expand_dims(bias, axes)
    return y.astype(out), (x, mean, inverse, scale)


def _layer_norm_backward(out: Any, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = kept
    axes = tuple(range(x.ndim - 1))
    gradient = gradient.astype(scale.dtype)
    normalized = (jax.lax.optimization_barrier(x).astype(scale.dtype) - mean) * inverse
    scaled = gradient * jnp.expand_dims(scale, axes)
    along = jnp.mean(scaled * normalized, axis=-1, keepdims=True)
    of_x = inverse * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normalized * along)
    return of_x.astype(x.dtype), jnp.sum(gradient * normalized, axis=axes), jnp.sum(gradient, axis=axes)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Return GELU in its tanh form, computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jnp.tanh(_gelu_argument(wide)))).astype(x.dtype)


def _gelu_argument(x: Array) -> Array:
    return GELU_FACTOR * (x + GELU_CUBE * x**3)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    tanh = jnp.tanh(_gelu_argument(wide))
    slope = GELU_FACTOR * (1 + 3 * GELU_CUBE * wide**2)
    derivative = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * slope
    return ((gradient.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
