"""GPT-2 in Flax NNX, exactly as Hugging Face computes it, with GPT-2's own names.

    B batch, T time, C channels, H heads, D head size, V vocabulary, S cache length, L layers

Pre-LayerNorm (eps 1e-5), tanh GELU, learned positions, head tied to the token embedding. Parameters
outside this file are a flat dict from GPT-2's names to arrays ("h.0.attn.c_attn.kernel"), so that
optimizer masks, checkpoints and the conversion all speak of the same names.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02

Params = dict[str, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for generation.

    Attributes:
      keys: (L, B, S, H, D).
      values: (L, B, S, H, D).
      length: (), number of tokens in it.
    """

    keys: Float[Array, "L B S H D"]
    values: Float[Array, "L B S H D"]
    length: Int[Array, ""]


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Zero a share of x and scale the rest up; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def _keys(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _linear(inputs: int, outputs: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, kernel_init=init, param_dtype=dtype, dtype=dtype, rngs=rngs)


def _layer_norm(channels: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        channels,
        epsilon=LAYER_NORM_EPSILON,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where a channel dominates
        param_dtype=dtype,
        dtype=dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.n_head, self.head_size, self.rate = config.n_head, config.head_size, config.dropout
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_attn = _linear(config.n_embd, 3 * config.n_embd, INIT_STD, dtype, rngs)
        self.c_proj = _linear(config.n_embd, config.n_embd, residual_std, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        cache: tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Int[Array, ""]] | None,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B S H D"], Float[Array, "B S H D"]] | None]:
        """Attend to the tokens up to each position, those in the cache included."""
        B, T, C = x.shape
        query, k, v = jnp.split(self.c_attn(x).reshape(B, T, 3 * self.n_head, self.head_size), 3, axis=2)
        start: Int[Array, ""] | int = 0
        if cache is not None:
            keys, values, start = cache
            k = jax.lax.dynamic_update_slice(keys, k, (0, start, 0, 0))
            v = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))
        weights = attention_weights(query, k, start)  # (B, H, T, S)
        attention_key, residual_key = _keys(key, 2)
        weights = dropout(weights, self.rate, attention_key)
        mixed = jnp.einsum("BHTS,BSHD->BTHD", weights, v).reshape(B, T, C)
        return dropout(self.c_proj(mixed), self.rate, residual_key), None if cache is None else (k, v)


def attention_weights(
    query: Float[Array, "B T H D"], key: Float[Array, "B S H D"], start: Int[Array, ""] | int
) -> Float[Array, "B H T S"]:
    """Softmax of the scaled scores over the positions that a token may see.

    Args:
      query: of T tokens at positions start, start + 1, ...
      key: of the positions 0 to S - 1.
      start: position of the first query.
    """
    T, S = query.shape[1], key.shape[1]
    scores = jnp.einsum("BTHD,BSHD->BHTS", query * query.shape[-1] ** -0.5, key)
    visible = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + start  # (T, S)
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(visible[None, None], scores, lowest), axis=-1)


class MLP(nnx.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_fc = _linear(config.n_embd, 4 * config.n_embd, INIT_STD, dtype, rngs)
        self.c_proj = _linear(4 * config.n_embd, config.n_embd, residual_std, dtype, rngs)

    def __call__(self, x: Float[Array, "B T C"], key: jax.Array | None) -> Float[Array, "B T C"]:
        """Apply both layers."""
        return dropout(self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True)), self.rate, key)


class Block(nnx.Module):
    """Attention and MLP, each on a normalized input and added to the stream."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.ln_1 = _layer_norm(config.n_embd, dtype, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = _layer_norm(config.n_embd, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        cache: tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Int[Array, ""]] | None,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B S H D"], Float[Array, "B S H D"]] | None]:
        """Return the new stream and the cache of this layer."""
        attention_key, mlp_key = _keys(key, 2)
        attended, cached = self.attn(self.ln_1(x), cache, attention_key)
        x = x + attended
        return x + self.mlp(self.ln_2(x), mlp_key), cached


class GPT(nnx.Module):
    """GPT-2.

    Args:
      config: shape.
      rngs: source of the initial parameters: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L)).
      dtype: of parameters and arithmetic.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        init = nnx.initializers.normal(INIT_STD)
        kwargs: dict[str, Any] = {"embedding_init": init, "param_dtype": dtype, "dtype": dtype, "rngs": rngs}
        self.rate = config.dropout
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, **kwargs)
        self.wpe = nnx.Embed(config.block_size, config.n_embd, **kwargs)
        self.h = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config.n_embd, dtype, rngs)

    def __call__(self, tokens: Int[Array, "B T"], key: jax.Array | None = None) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position.

        Args:
          tokens: ids in [0, V), T <= block_size.
          key: random key for dropout; None for none.
        """
        x, _ = self._stream(tokens, None, key)
        return self.wte.attend(x)

    def with_cache(self, tokens: Int[Array, "B T"], cache: Cache) -> tuple[Float[Array, "B T V"], Cache]:
        """Return the logits of tokens that follow those in the cache, and the cache with them."""
        x, new = self._stream(tokens, cache, None)
        assert new is not None
        return self.wte.attend(x), new

    def _stream(
        self, tokens: Int[Array, "B T"], cache: Cache | None, key: jax.Array | None
    ) -> tuple[Float[Array, "B T C"], Cache | None]:
        T = tokens.shape[1]
        first, *layer_keys = _keys(key, 1 + len(self.h))
        start = 0 if cache is None else cache.length
        x = self.wte(tokens) + self.wpe(start + jnp.arange(T))[None]
        x = dropout(x, self.rate, first)
        keys, values = [], []
        for index, (block, layer_key) in enumerate(zip(self.h, layer_keys, strict=True)):
            layer = None if cache is None else (cache.keys[index], cache.values[index], cache.length)
            x, cached = block(x, layer, layer_key)
            if cached is not None:
                keys.append(cached[0])
                values.append(cached[1])
        new = None if cache is None else Cache(jnp.stack(keys), jnp.stack(values), cache.length + T)
        return self.ln_f(x), new


def empty_cache(config: ModelConfig, batch: int, dtype: Any = jnp.float32) -> Cache:
    """Return a cache that holds no token yet, with room for block_size."""
    shape = (config.n_layer, batch, config.block_size, config.n_head, config.head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def graph_of(config: ModelConfig, dtype: Any = jnp.float32) -> nnx.GraphDef[GPT]:
    """Return the model's structure without any array."""
    abstract = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0), dtype))
    return nnx.split(abstract, nnx.Param)[0]


def init_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Return new parameters: flat, under GPT-2's names."""
    return params_of(GPT(config, nnx.Rngs(seed), dtype))


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(lambda: init_params(config, 0))


def params_of(model: GPT) -> Params:
    """Return a model's parameters: flat, under GPT-2's names, such as "h.0.attn.c_attn.kernel"."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def merge(graph: nnx.GraphDef[GPT], params: Params) -> GPT:
    """Put parameters into the structure; inside jit this costs nothing at run time."""
    flat = []
    for name, array in params.items():
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        flat.append((path, nnx.Param(array)))
    return nnx.merge(graph, nnx.from_flat_state(flat))
