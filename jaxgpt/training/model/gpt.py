"""GPT-2 in Flax NNX, exactly as Hugging Face computes it, with GPT-2's own names.

    B batch, T time, C channels, H heads, D head size, V vocabulary, S cache length, L layers

Pre-LayerNorm (eps 1e-5), tanh GELU, learned positions (or rotary ones), head tied to the token embedding
or with a matrix of its own. With `config.qat` linear layers and embeddings are those of fake_quant.py.
Linear layers and attention compute in `compute` (float32, bfloat16 or float16); parameters, the residual
stream, LayerNorm, softmax and logits stay in the parameters' dtype. Parameters outside this file are a flat
dict from GPT-2's names to arrays ("h.0.attn.c_attn.kernel"; see params.py), so that optimizer, checkpoints
and conversion all speak of the same names.

Read `GPT.features` first, then `Block` and, in attention.py, `Attention.__call__`: that is the forward pass
of a training. `with_cache` is the same for generation, with the keys and values of earlier tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.attention import Attention, LayerCache
from jaxgpt.training.model.fake_quant import FakeQuantEmbed, fake_quant_rows, round_inputs
from jaxgpt.training.model.layers import (
    INIT_STD,
    apply_to_rows,
    dropout,
    gelu,
    layer_norm,
    linear,
    split_keys,
)
from jaxgpt.training.model.numerics import FLOAT32, Numerics, matmul


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, for generation.

    Attributes:
      keys: (L, B, S, H, D).
      values: (L, B, S, H, D).
      length: (), number of tokens in it.
    """

    keys: Float[Array, "L B S H D"]
    values: Float[Array, "L B S H D"]
    length: Int[Array, ""]

    def layer(self, index: int) -> LayerCache:
        """Return the part of one layer."""
        return LayerCache(self.keys[index], self.values[index], self.length)


class MLP(nnx.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.rate, self.numerics = config.dropout, numerics
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_fc = linear(config.n_embd, 4 * config.n_embd, INIT_STD, config, numerics, rngs)
        self.c_proj = linear(4 * config.n_embd, config.n_embd, residual_std, config, numerics, rngs)

    def __call__(self, x: Float[Array, "B T C"], key: jax.Array | None = None) -> Float[Array, "B T C"]:
        """Apply both layers; key: (B,), for dropout."""
        inner = gelu(apply_to_rows(self.c_fc, x), self.numerics)
        return dropout(apply_to_rows(self.c_proj, inner), self.rate, key)


class Block(nnx.Module):
    """Attention and MLP, each on a normalized input and added to the stream."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.ln_1 = layer_norm(config, numerics, rngs)
        self.attn = Attention(config, numerics, rngs)
        self.ln_2 = layer_norm(config, numerics, rngs)
        self.mlp = MLP(config, numerics, rngs)

    def __call__(self, x: Float[Array, "B T C"], key: jax.Array | None = None) -> Float[Array, "B T C"]:
        """Return the new stream; key: (B,), for dropout."""
        attention_key, mlp_key = split_keys(key, 2)
        x = x + self.attn(self.ln_1(x), attention_key)
        return x + self.mlp(self.ln_2(x), mlp_key)

    def with_cache(
        self, x: Float[Array, "B T C"], cache: LayerCache
    ) -> tuple[Float[Array, "B T C"], LayerCache]:
        """Return the new stream of tokens that follow those in the cache, and the cache with them."""
        attended, cache = self.attn.with_cache(self.ln_1(x), cache)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class LMHead(nnx.Module):
    """What the head has besides the token embedding.

    Attributes:
      embedding: (V, C), its own table; None where it is tied to the token embedding.
      input_scale: (), scale of its input, trained; None without `config.qat`.
      observing: compute in floats and sow the input; see qat_scales.py.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        init, shape = nnx.initializers.normal(INIT_STD), (config.vocab_size, config.n_embd)
        dtype = numerics.params
        self.embedding = None if config.tied else nnx.Param(init(rngs.params(), shape, dtype))
        self.input_scale = nnx.Param(jnp.ones((), dtype)) if config.qat else None
        self.observing = False

    def operands(
        self, x: Float[Array, "*N C"], wte: Float[Array, "V2 C"]
    ) -> tuple[Float[Array, "*N C"], Float[Array, "V2 C"]]:
        """Return the operands of the head's product: features and table, rounded where the model rounds."""
        table = wte if self.embedding is None else self.embedding[...]
        if self.observing:
            self.sow(nnx.Intermediate, "inputs", x)
        if self.input_scale is None or self.observing:
            return x, table
        scale = self.input_scale[...]
        return round_inputs(x, scale) * scale, fake_quant_rows(table)


class GPT(nnx.Module):
    """GPT-2.

    Args:
      config: shape.
      rngs: source of the initial parameters: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L)).
      numerics: of parameters and of matrix products.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, numerics: Numerics = FLOAT32) -> None:
        init = nnx.initializers.normal(INIT_STD)
        dtype = numerics.params
        kwargs: dict[str, Any] = {"embedding_init": init, "param_dtype": dtype, "dtype": dtype, "rngs": rngs}
        self.rate, self.numerics, self.vocab_size = config.dropout, numerics, config.vocab_size
        embed = FakeQuantEmbed if config.qat else nnx.Embed
        self.wte = embed(config.vocab_size, config.n_embd, **kwargs)
        self.learned = config.positions == "learned"
        if self.learned:
            self.wpe = embed(config.block_size, config.n_embd, **kwargs)
        self.h = nnx.List([Block(config, numerics, rngs) for _ in range(config.n_layer)])
        self.ln_f = layer_norm(config, numerics, rngs)
        self.lm_head = LMHead(config, numerics, rngs)

    def __call__(self, tokens: Int[Array, "B T"], keys: jax.Array | None = None) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position.

        Args:
          tokens: ids in [0, V), T <= block_size.
          keys: (B,), random keys for dropout; None for none.
        """
        return self.head(self.features(tokens, keys))

    def features(
        self, tokens: Int[Array, "B T"], keys: jax.Array | None = None, remat: bool = False
    ) -> Float[Array, "B T C"]:
        """Return the features of every position: what the head multiplies.

        Args:
          tokens: ids in [0, V), T <= block_size.
          keys: (B,), random keys for dropout; None for none.
          remat: keep only the stream between blocks for the backward pass and compute the rest again.
        """
        embedding_key, *block_keys = split_keys(keys, 1 + len(self.h))
        x = dropout(self._embed(tokens, 0), self.rate, embedding_key)
        for block, key in zip(self.h, block_keys, strict=True):
            call = jax.checkpoint(functools.partial(_call, block)) if remat else block
            x = call(x, key)
        return self.ln_f(x)

    def with_cache(self, tokens: Int[Array, "B T"], cache: KVCache) -> tuple[Float[Array, "B T V"], KVCache]:
        """Return the logits of tokens that follow those in the cache, and the cache with them."""
        x = self._embed(tokens, cache.length)
        layers = []
        for index, block in enumerate(self.h):
            x, layer = block.with_cache(x, cache.layer(index))
            layers.append(layer)
        keys, values = (
            jnp.stack(parts) for parts in zip(*((each.keys, each.values) for each in layers), strict=True)
        )
        return self.head(self.ln_f(x)), KVCache(keys, values, cache.length + tokens.shape[1])

    def _embed(self, tokens: Int[Array, "B T"], start: Int[Array, ""] | int) -> Float[Array, "B T C"]:
        """Return the stream before the first block, of tokens at positions start, start + 1, ..."""
        x = self.wte(tokens)
        x = x + self.wpe(start + jnp.arange(tokens.shape[1]))[None] if self.learned else x
        return x.astype(self.numerics.stream)

    def head(self, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Return the logits of features."""
        B, T, C = x.shape
        rows, table = self.head_operands(x.reshape(B * T, C))
        return logits_of(rows, table, self.vocab_size, self.numerics).reshape(B, T, -1)

    def head_operands(self, x: Float[Array, "*N C"]) -> tuple[Float[Array, "*N C"], Float[Array, "V2 C"]]:
        """Return the two operands of the head's product: features, and the table that is the head."""
        return self.lm_head.operands(x, self.wte.embedding[...])


def _call(block: Block, *arguments: Any) -> Any:
    return block(*arguments)


def logits_of(
    x: Float[Array, "N C"], table: Float[Array, "V2 C"], vocab_size: int, numerics: Numerics, out: Any = None
) -> Float[Array, "N V2"]:
    """Return the logits of features, in the parameters' dtype if `out` names no other.

    Those of rows that only pad the table are the lowest number there is.
    """
    logits = matmul("NC,VC->NV", x, table, numerics, out)
    if len(table) == vocab_size:
        return logits
    real = jnp.arange(len(table))[None] < vocab_size
    return jnp.where(real, logits, jnp.finfo(logits.dtype).min)


def empty_cache(config: ModelConfig, batch: int, dtype: Any = jnp.float32) -> KVCache:
    """Return a cache that holds no token yet, with room for block_size."""
    shape = (config.n_layer, batch, config.block_size, config.n_head, config.head_size)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
