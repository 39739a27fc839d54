"""Causal multi-head self-attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.shared.config import ROTARY_BASE, ModelConfig
from jaxgpt.training.model.layers import INIT_STD, Linear, apply_to_rows, dropout, linear, split_keys
from jaxgpt.training.model.numerics import FLOAT32, Numerics, matmul


class LayerCache(NamedTuple):
    """Keys and values of one layer, of the tokens so far.

    Attributes:
      keys: (B, S, H, D), of which the first `length` positions count.
      values: (B, S, H, D).
      length: (), number of tokens in it.
    """

    keys: Float[Array, "B S H D"]
    values: Float[Array, "B S H D"]
    length: Int[Array, ""]


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.n_head, self.head_size = config.n_head, config.head_size
        self.rate, self.weights_rate = config.dropout, config.attn_rate
        self.numerics, self.rotary = numerics, config.positions == "rotary"
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_attn = linear(config.n_embd, 3 * config.n_embd, INIT_STD, config, numerics, rngs)
        self.c_proj = linear(config.n_embd, config.n_embd, residual_std, config, numerics, rngs)

    def __call__(self, x: Float[Array, "B T C"], key: jax.Array | None = None) -> Float[Array, "B T C"]:
        """Attend to the tokens up to each position.

        Args:
          x: normalized stream.
          key: (B,), for dropout; None for none.
        """
        query, k, v = self._query_key_value(x, 0)
        weights_key, residual_key = split_keys(key, 2)
        if self.numerics.flash:
            mixed = jax.nn.dot_product_attention(query, k, v, is_causal=True, implementation="cudnn")
        else:
            mixed = self._mix(query, k, v, 0, weights_key)
        return dropout(self._project(mixed), self.rate, residual_key)

    def with_cache(
        self, x: Float[Array, "B T C"], cache: LayerCache
    ) -> tuple[Float[Array, "B T C"], LayerCache]:
        """Attend to the tokens in the cache and to these, up to each position; return the cache with them."""
        query, k, v = self._query_key_value(x, cache.length)
        keys = jax.lax.dynamic_update_slice(cache.keys, k, (0, cache.length, 0, 0))
        values = jax.lax.dynamic_update_slice(cache.values, v, (0, cache.length, 0, 0))
        out = self._project(self._mix(query, keys, values, cache.length, None))
        return out, LayerCache(keys, values, cache.length + x.shape[1])

    def _query_key_value(
        self, x: Float[Array, "B T C"], start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        B, T, C = x.shape
        if self.numerics.unfused_qkv and isinstance(self.c_attn, Linear):
            shape = (B, T, self.n_head, self.head_size)
            query, k, v = (part.reshape(shape) for part in self.c_attn.thirds(x.reshape(B * T, C)))
        else:
            qkv = apply_to_rows(self.c_attn, x).reshape(B, T, 3 * self.n_head, self.head_size)
            query, k, v = jnp.split(qkv, 3, axis=2)
        if self.rotary:
            positions = start + jnp.arange(T)
            query, k = rotate(query, positions), rotate(k, positions)
        return query, k, v

    def _mix(
        self,
        query: Float[Array, "B T H D"],
        keys: Float[Array, "B S H D"],
        values: Float[Array, "B S H D"],
        start: Int[Array, ""] | int,
        key: jax.Array | None,
    ) -> Float[Array, "B T H D"]:
        """Mix values by the softmax of their scores, with dropout of these weights."""
        weights = attention_weights(query, keys, start, self.numerics)  # (B, H, T, S)
        weights = dropout(weights, self.weights_rate, key)
        return matmul("BHTS,BSHD->BTHD", weights, values, self.numerics)

    def _project(self, mixed: Float[Array, "B T H D"]) -> Float[Array, "B T C"]:
        B, T = mixed.shape[:2]
        return apply_to_rows(self.c_proj, mixed.reshape(B, T, -1))


def rotate(x: Float[Array, "B T H D"], positions: Int[Array, "T"]) -> Float[Array, "B T H D"]:
    """Turn each pair of channels (i, i + D/2) by position * 10000^(-2 i / D), in float32 or wider.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864; pairs as in GPT-NeoX.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[:, None].astype(dtype) * ROTARY_BASE ** (-jnp.arange(half, dtype=dtype) / half)[None]
    cosine, sine = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]  # (1, T, 1, D/2)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention_weights(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    start: Int[Array, ""] | int,
    numerics: Numerics = FLOAT32,
) -> Float[Array, "B H T S"]:
    """Softmax of the scaled scores over the positions that a token may see.

    Args:
      query: of T tokens at positions start, start + 1, ...
      key: of the positions 0 to S - 1.
      start: position of the first query.
      numerics: of the product and of the softmax.
    """
    T, S = query.shape[1], key.shape[1]
    scores = matmul("BTHD,BSHD->BHTS", query * query.shape[-1] ** -0.5, key, numerics)
    visible = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + start  # (T, S)
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(visible[None, None], scores, lowest), axis=-1)
