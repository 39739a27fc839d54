"""Causal multi-head self-attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.shared.config import ROTARY_BASE, ModelConfig
from jaxgpt.training.model.layers import INIT_STD, apply_to_rows, dropout, linear, split_keys
from jaxgpt.training.model.numerics import FLOAT32, Numerics, matmul


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.n_head, self.head_size, self.rate = config.n_head, config.head_size, config.dropout
        self.numerics, self.rotary = numerics, config.positions == "rotary"
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_attn = linear(config.n_embd, 3 * config.n_embd, INIT_STD, config, numerics, rngs)
        self.c_proj = linear(config.n_embd, config.n_embd, residual_std, config, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        cache: tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Int[Array, ""]] | None,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B S H D"], Float[Array, "B S H D"]] | None]:
        """Attend to the tokens up to each position, those in the cache included."""
        B, T, C = x.shape
        qkv = apply_to_rows(self.c_attn, x).reshape(B, T, 3 * self.n_head, self.head_size)
        query, k, v = jnp.split(qkv, 3, axis=2)
        start: Int[Array, ""] | int = 0 if cache is None else cache[2]
        if self.rotary:
            positions = start + jnp.arange(T)
            query, k = rotate(query, positions), rotate(k, positions)
        if cache is not None:
            keys, values, _ = cache
            k = jax.lax.dynamic_update_slice(keys, k, (0, start, 0, 0))
            v = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))
        attention_key, residual_key = split_keys(key, 2)
        if self.numerics.flash and cache is None:
            mixed = jax.nn.dot_product_attention(query, k, v, is_causal=True, implementation="cudnn")
        else:
            weights = attention_weights(query, k, start, self.numerics)  # (B, H, T, S)
            weights = dropout(weights, self.rate, attention_key)
            mixed = matmul("BHTS,BSHD->BTHD", weights, v, self.numerics)
        out = apply_to_rows(self.c_proj, mixed.reshape(B, T, C))
        return dropout(out, self.rate, residual_key), None if cache is None else (k, v)


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
