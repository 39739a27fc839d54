"""Training with the rounding of a static INT8 artifact (quantization-aware training).

`jaxgpt_export.model.arithmetic` defines the numbers: the integers and scales here are the same bits, but for
numbers below 2^-126, which XLA takes for 0. A product multiplies integers, held in floats, and scales the
sum:

    y = sum(q_x q_w) * (s_x * s_w) + bias

Products of at most 127^2 and sums below 2^24 are exact in float32, and so with bfloat16 factors.

Rounding passes gradients through, all else is differentiated as it is written, so the gradient of an
input's scale s is LSQ's: q - x / s where x / s lies within 127, else 127 or -127. Scales of weights follow
from the weights and have no gradient.

Source: Esser et al. 2020, Learned Step Size Quantization, arXiv:1902.08153.
"""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.training.model.numerics import FLOAT32, Numerics, matmul

T = TypeVar("T")

LEVELS = 127
MIN_SCALE = 2.0**-126
INPUT_SCALE = "input_scale"  # last part of the name of an input's scale


@jax.custom_jvp
def round_ste(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Round halves to even; the gradient is that of the identity."""
    return jnp.round(x)


@round_ste.defjvp
def _round_through_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_ste(primals[0]), tangents[0]


def divide(x: Float[Array, "*N"], by: Float[Array, "..."] | int) -> Float[Array, "*N"]:
    """Divide each value by the same one, or rows by their own.

    XLA would multiply by the reciprocal of a constant or of what was broadcast, and integers would differ;
    behind the barrier it sees neither.
    """
    whole = jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape)
    return x / jax.lax.optimization_barrier(whole)


def scale_of(largest: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Return the scale that puts the largest absolute value on 127."""
    return jnp.maximum(divide(largest, LEVELS), MIN_SCALE)


def round_weight(weight: Float[Array, "*N"], axis: int) -> tuple[Float[Array, "*N"], Float[Array, "*M"]]:
    """Round what lies along an axis (the inputs of one output) with a scale of its own.

    Args:
      weight: finite.
      axis: along which a scale holds.

    Returns:
      q: integers in [-127, 127].
      scale: with length 1 along the axis.
    """
    scale = scale_of(jnp.max(jnp.abs(jax.lax.stop_gradient(weight)), axis=axis, keepdims=True))
    return round_ste(divide(weight, scale)), scale


def fake_quant_rows(table: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    """Return rows of an embedding as an artifact stores them: integers times the row's scale."""
    q, scale = round_weight(table, -1)
    return q * scale


def round_inputs(x: Float[Array, "*N"], scale: Float[Array, ""]) -> Float[Array, "*N"]:
    """Round to integers in [-127, 127] with a given scale.

    Clipped before it is rounded, which gives the same integers, and LSQ's gradient at 126.5 and above.
    """
    return round_ste(jnp.clip(divide(x, scale), -LEVELS, LEVELS))


def without_scales(params: dict[str, T]) -> dict[str, T]:
    """Return what a model that rounds nothing has of these parameters."""
    return {name: value for name, value in params.items() if not name.endswith(INPUT_SCALE)}


class FakeQuantLinear(nnx.Linear):
    """A linear layer as the static INT8 artifact computes it.

    Args:
      in_features: I.
      out_features: O.
      numerics: of the product. Without wide sums, integers are multiplied in the parameters' dtype: their
        sums pass float16's 65,504.
      kwargs: see nnx.Linear.

    Attributes:
      numerics: of the product.
      input_scale: (), scale of the input, trained.
      observing: compute in floats and sow the input; see calibration.py.
    """

    def __init__(
        self, in_features: int, out_features: int, numerics: Numerics = FLOAT32, **kwargs: Any
    ) -> None:
        dtypes = {"dtype": numerics.compute, "param_dtype": numerics.params}
        super().__init__(in_features, out_features, **dtypes, **kwargs)
        self.numerics = numerics if numerics.wide_sums else numerics._replace(compute=numerics.params)
        self.input_scale = nnx.Param(jnp.ones((), self.param_dtype))
        self.observing = False

    def __call__(self, inputs: Float[Array, "N I"], out_sharding: Any = None) -> Float[Array, "N O"]:
        """Return the output in the layer's compute dtype."""
        if self.observing:
            self.sow(nnx.Intermediate, "inputs", inputs)
            return super().__call__(inputs, out_sharding)
        q_w, w_scale = round_weight(self.kernel[...], 0)
        x_scale = self.input_scale[...]
        q_x = round_inputs(inputs.astype(self.param_dtype), x_scale)
        product = mixed_integer_matmul if self.numerics.is_mixed else integer_matmul
        y = product(self.numerics, q_x, q_w, x_scale, w_scale) + self.bias[...][None]
        return y.astype(self.dtype)


def integer_matmul(
    numerics: Numerics,
    q_x: Float[Array, "N I"],
    q_w: Float[Array, "I O"],
    x_scale: Float[Array, ""],
    w_scale: Float[Array, "1 O"],
) -> Float[Array, "N O"]:
    """Multiply integers, exactly, and scale the sums."""
    return matmul("NI,IO->NO", q_x, q_w, numerics) * (x_scale * w_scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixed_integer_matmul(numerics: Numerics, q_x: Array, q_w: Array, x_scale: Array, w_scale: Array) -> Array:
    """Do the same; the backward products, too, have operands in the compute dtype.

    They are those of a float layer, of the weights q_w * w_scale: the gradient of the integers' product
    itself, which is that of y times both scales, would vanish in float16.
    """
    return integer_matmul(numerics, q_x, q_w, x_scale, w_scale)


def _mixed_integer_matmul_forward(
    numerics: Numerics, q_x: Array, q_w: Array, x_scale: Array, w_scale: Array
) -> tuple[Array, tuple[Array, ...]]:
    y = mixed_integer_matmul(numerics, q_x, q_w, x_scale, w_scale)
    return y, (q_x.astype(numerics.compute), q_w.astype(numerics.compute), x_scale, w_scale)


def _mixed_integer_matmul_backward(
    numerics: Numerics, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array, Array]:
    q_x, q_w, x_scale, w_scale = kept
    weight = q_w.astype(numerics.params) * w_scale
    of_x = matmul("NO,IO->NI", gradient, weight, numerics)  # of q_x * x_scale
    of_w = matmul("NI,NO->IO", q_x, gradient, numerics) * (x_scale * w_scale)
    of_scale = jnp.sum(q_x.astype(numerics.params) * of_x)
    return of_x * x_scale, of_w, of_scale, jnp.zeros_like(w_scale)


mixed_integer_matmul.defvjp(_mixed_integer_matmul_forward, _mixed_integer_matmul_backward)


class FakeQuantEmbed(nnx.Embed):
    """An embedding as the INT8 artifact stores it.

    Attributes:
      observing: give the rows as they are; see calibration.py.
    """

    def __init__(self, num_embeddings: int, features: int, **kwargs: Any) -> None:
        super().__init__(num_embeddings, features, **kwargs)
        self.observing = False

    def __call__(self, inputs: Int[Array, "..."], out_sharding: Any = None) -> Float[Array, "..."]:
        """Return the rounded rows of tokens or positions."""
        rows = super().__call__(inputs, out_sharding)
        return rows if self.observing else fake_quant_rows(rows)
