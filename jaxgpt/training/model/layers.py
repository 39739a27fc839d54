"""The layers that attention and MLP are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxgpt.shared.architecture import LAYER_NORM_EPSILON
from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model import fused
from jaxgpt.training.model.fake_quant import FakeQuantLinear
from jaxgpt.training.model.numerics import Numerics, matmul

INIT_STD = 0.02


def dropout(x: Float[Array, "B ..."], rate: float, keys: jax.Array | None) -> Float[Array, "B ..."]:
    """Zero a share of x and scale the rest up; x itself without keys.

    A key a sequence, (B,), so that what is dropped does not depend on how the batch is split.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_keys(keys: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Derive `count` keys from each of (B,) keys; None stays None."""
    if keys is None:
        return [None] * count
    return [jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(count)]


def linear(
    inputs: int, outputs: int, std: float, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs
) -> nnx.Linear:
    """Return a linear layer with weights of N(0, std), as fake quantization computes it where asked for."""
    kind = FakeQuantLinear if config.qat else Linear
    return kind(inputs, outputs, numerics, kernel_init=nnx.initializers.normal(std), rngs=rngs)


class Linear(nnx.Linear):
    """A linear layer whose gradients, too, are products of the compute dtype with sums in the parameters'.

    Args:
      in_features: I.
      out_features: O.
      numerics: of the product.
      kwargs: see nnx.Linear.
    """

    def __init__(self, in_features: int, out_features: int, numerics: Numerics, **kwargs: Any) -> None:
        dtypes = {"dtype": numerics.compute, "param_dtype": numerics.params}
        super().__init__(in_features, out_features, **dtypes, **kwargs)
        self.numerics = numerics

    def __call__(self, inputs: Float[Array, "N I"], out_sharding: Any = None) -> Float[Array, "N O"]:
        """Return the output in the compute dtype."""
        if not self.numerics.is_mixed and not self.numerics.on_cpu:
            return super().__call__(inputs, out_sharding)
        return self._product(inputs, self.kernel[...], self.bias[...])

    def thirds(self, inputs: Float[Array, "N I"]) -> list[Float[Array, "N O3"]]:
        """Return the output in three parts of equal width, each of a product of its own."""
        kernels, biases = jnp.split(self.kernel[...], 3, axis=1), jnp.split(self.bias[...], 3)
        return [self._product(inputs, *part) for part in zip(kernels, biases, strict=True)]

    def _product(self, x: Array, kernel: Array, bias: Array) -> Array:
        y = matmul("NI,IO->NO", x.astype(self.dtype), kernel, self.numerics, self.dtype)
        return add_bias(y, bias)


@jax.custom_vjp
def add_bias(y: Float[Array, "N O"], bias: Float[Array, "O"]) -> Float[Array, "N O"]:
    """Add a bias in y's dtype; its gradient is summed in its own.

    JAX would sum it in y's, and a sum of thousands of bfloat16 numbers soon stands still.
    """
    return y + bias.astype(y.dtype)[None]


def _add_bias_forward(y: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(y, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(gradient, axis=0, dtype=bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def apply_to_rows(layer: nnx.Linear, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """Apply a linear layer to (B * T, I).

    With two axes left out of its product, XLA's CPU backend would transpose a copy of x for the gradient of
    the weights, and compute again whatever x was fused from.
    """
    B, T, I = x.shape
    return layer(x.reshape(B * T, I)).reshape(B, T, -1)


def layer_norm(config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm as GPT-2 has it, in the parameters' dtype."""
    return LayerNorm(
        config.n_embd,
        numerics,
        out=numerics.params if config.qat else numerics.compute,  # integers are rounded from float32
        epsilon=LAYER_NORM_EPSILON,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where a channel dominates
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """A LayerNorm in the parameters' dtype; a fused one where the numerics say so.

    Args:
      num_features: C.
      numerics: of the model.
      out: dtype of the fused one's result, which is what takes it in its compute dtype.
      kwargs: see nnx.LayerNorm.
    """

    def __init__(self, num_features: int, numerics: Numerics, out: Any, **kwargs: Any) -> None:
        dtypes = {"dtype": numerics.params, "param_dtype": numerics.params}
        super().__init__(num_features, **dtypes, **kwargs)
        self.out = out if numerics.fused_layer_norm else None

    def __call__(self, x: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
        """Return x, normalized over its channels."""
        if self.out is None:
            return super().__call__(x)
        return fused.layer_norm(x, self.scale[...], self.bias[...], self.out)


def gelu(x: Float[Array, "*N"], numerics: Numerics) -> Float[Array, "*N"]:
    """Return GELU in its tanh form."""
    return fused.gelu(x) if numerics.fused_gelu else jax.nn.gelu(x, approximate=True)
