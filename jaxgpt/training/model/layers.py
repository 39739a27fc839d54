"""The layers that attention and MLP are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxgpt.shared.architecture import LAYER_NORM_EPSILON
from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.fake_quant import FakeQuantLinear
from jaxgpt.training.model.numerics import Numerics

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
    init = nnx.initializers.normal(std)
    kwargs: dict[str, Any] = {"param_dtype": numerics.params, "dtype": numerics.compute}
    kwargs |= {"kernel_init": init, "rngs": rngs}
    if config.qat:
        return FakeQuantLinear(inputs, outputs, numerics.wide_sums, **kwargs)
    return nnx.Linear(inputs, outputs, **kwargs)


def apply_to_rows(layer: nnx.Linear, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """Apply a linear layer to (B * T, I).

    With two axes left out of its product, XLA's CPU backend would transpose a copy of x for the gradient of
    the weights, and compute again whatever x was fused from.
    """
    B, T, I = x.shape
    return layer(x.reshape(B * T, I)).reshape(B, T, -1)


def layer_norm(channels: int, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm as GPT-2 has it, in the parameters' dtype."""
    return nnx.LayerNorm(
        channels,
        epsilon=LAYER_NORM_EPSILON,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where a channel dominates
        param_dtype=numerics.params,
        dtype=numerics.params,
        rngs=rngs,
    )
