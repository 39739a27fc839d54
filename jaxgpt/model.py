"""GPT-2 in Flax NNX, exactly as Hugging Face computes it, with GPT-2's own names.

    B batch, T time, C channels, H heads, D head size, V vocabulary, S cache length, L layers

Pre-LayerNorm (eps 1e-5), tanh GELU, learned positions (or rotary ones), head tied to the token embedding
or with a matrix of its own. With `config.qat` linear layers and embeddings are those of rounding.py.
Linear layers and attention compute in `compute` (float32, bfloat16 or float16); parameters, the residual
stream, LayerNorm, softmax and logits stay in the parameters' dtype. Parameters outside this file are a flat
dict from GPT-2's names to arrays ("h.0.attn.c_attn.kernel"), so that optimizer masks, checkpoints and the
conversion all speak of the same names.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import ROTARY_BASE, ModelConfig
from jaxgpt.rounding import RoundedEmbed, RoundedLinear, round_inputs, rounded_rows

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02

TABLES = ("wte.embedding", "lm_head.embedding")  # a row a token

Params = dict[str, jax.Array]
HostParam = npt.NDArray[np.float32]
HostParams = dict[str, HostParam]


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


def dropout(x: Float[Array, "B ..."], rate: float, keys: jax.Array | None) -> Float[Array, "B ..."]:
    """Zero a share of x and scale the rest up; x itself without keys.

    A key a sequence, (B,), so that what is dropped does not depend on how the batch is split.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _keys(keys: jax.Array | None, count: int) -> list[jax.Array | None]:
    if keys is None:
        return [None] * count
    return [jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(count)]


def _matmul(equation: str, a: Float[Array, "..."], b: Float[Array, "..."], numerics: Numerics) -> Array:
    """Multiply in the compute dtype, sum and return in the parameters' dtype."""
    # XLA's CPU backend has no float16 product with float32 sums; only tests compute so there.
    emulated = numerics.compute == jnp.float16 and jax.default_backend() == "cpu"
    out = None if emulated else numerics.params
    product = jnp.einsum(
        equation, a.astype(numerics.compute), b.astype(numerics.compute), preferred_element_type=out
    )
    return product.astype(numerics.params)


def _linear(
    inputs: int, outputs: int, std: float, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    kwargs: dict[str, Any] = {"param_dtype": numerics.params, "dtype": numerics.compute}
    kind = RoundedLinear if config.qat else nnx.Linear
    return kind(inputs, outputs, kernel_init=init, rngs=rngs, **kwargs)


def apply_to_rows(layer: nnx.Linear, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """Apply a linear layer to (B * T, I).

    With two axes left out of its product, XLA's CPU backend would transpose a copy of x for the gradient of
    the weights, and compute again whatever x was fused from.
    """
    B, T, I = x.shape
    return layer(x.reshape(B * T, I)).reshape(B, T, -1)


def _layer_norm(channels: int, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        channels,
        epsilon=LAYER_NORM_EPSILON,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where a channel dominates
        param_dtype=numerics.params,
        dtype=numerics.params,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.n_head, self.head_size, self.rate = config.n_head, config.head_size, config.dropout
        self.numerics, self.rotary = numerics, config.positions == "rotary"
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_attn = _linear(config.n_embd, 3 * config.n_embd, INIT_STD, config, numerics, rngs)
        self.c_proj = _linear(config.n_embd, config.n_embd, residual_std, config, numerics, rngs)

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
        attention_key, residual_key = _keys(key, 2)
        if self.numerics.flash and cache is None:
            mixed = jax.nn.dot_product_attention(query, k, v, is_causal=True, implementation="cudnn")
        else:
            weights = attention_weights(query, k, start, self.numerics)  # (B, H, T, S)
            weights = dropout(weights, self.rate, attention_key)
            mixed = _matmul("BHTS,BSHD->BTHD", weights, v, self.numerics)
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
    scores = _matmul("BTHD,BSHD->BHTS", query * query.shape[-1] ** -0.5, key, numerics)
    visible = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + start  # (T, S)
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(visible[None, None], scores, lowest), axis=-1)


class MLP(nnx.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        self.c_fc = _linear(config.n_embd, 4 * config.n_embd, INIT_STD, config, numerics, rngs)
        self.c_proj = _linear(4 * config.n_embd, config.n_embd, residual_std, config, numerics, rngs)

    def __call__(self, x: Float[Array, "B T C"], key: jax.Array | None) -> Float[Array, "B T C"]:
        """Apply both layers."""
        inner = jax.nn.gelu(apply_to_rows(self.c_fc, x), approximate=True)
        return dropout(apply_to_rows(self.c_proj, inner), self.rate, key)


class Block(nnx.Module):
    """Attention and MLP, each on a normalized input and added to the stream."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.ln_1 = _layer_norm(config.n_embd, numerics, rngs)
        self.attn = Attention(config, numerics, rngs)
        self.ln_2 = _layer_norm(config.n_embd, numerics, rngs)
        self.mlp = MLP(config, numerics, rngs)

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


class LMHead(nnx.Module):
    """What the head has besides the token embedding.

    Attributes:
      embedding: (V, C), its own table; None where it is tied to the token embedding.
      input_scale: (), step of its input, trained; None without `config.qat`.
      observing: compute in floats and sow the input; see calibration.py.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        init, shape = nnx.initializers.normal(INIT_STD), (config.vocab_size, config.n_embd)
        dtype = numerics.params
        self.embedding = None if config.tied else nnx.Param(init(rngs.params(), shape, dtype))
        self.input_scale = nnx.Param(jnp.ones((), dtype)) if config.qat else None
        self.observing = False

    def factors(
        self, x: Float[Array, "*N C"], wte: Float[Array, "V2 C"]
    ) -> tuple[Float[Array, "*N C"], Float[Array, "V2 C"]]:
        """Return features and table as they are multiplied."""
        table = wte if self.embedding is None else self.embedding[...]
        if self.observing:
            self.sow(nnx.Intermediate, "inputs", x)
        if self.input_scale is None or self.observing:
            return x, table
        scale = self.input_scale[...]
        return round_inputs(x, scale) * scale, rounded_rows(table)


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
        embed = RoundedEmbed if config.qat else nnx.Embed
        self.wte = embed(config.vocab_size, config.n_embd, **kwargs)
        self.learned = config.positions == "learned"
        if self.learned:
            self.wpe = embed(config.block_size, config.n_embd, **kwargs)
        self.h = nnx.List([Block(config, numerics, rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config.n_embd, numerics, rngs)
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
        """Return what the head sees.

        Args:
          tokens: ids in [0, V), T <= block_size.
          keys: (B,), random keys for dropout; None for none.
          remat: keep only the stream between blocks for the backward pass and compute the rest again.
        """
        return self._stream(tokens, None, keys, remat)[0]

    def head(self, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Return the logits of features."""
        B, T, C = x.shape
        rows, table = self.factors(x.reshape(B * T, C))
        return logits_of(rows, table, self.vocab_size, self.numerics).reshape(B, T, -1)

    def factors(self, x: Float[Array, "*N C"]) -> tuple[Float[Array, "*N C"], Float[Array, "V2 C"]]:
        """Return what the logits are the products of: features, and the table that is the head."""
        return self.lm_head.factors(x, self.wte.embedding[...])

    def with_cache(self, tokens: Int[Array, "B T"], cache: Cache) -> tuple[Float[Array, "B T V"], Cache]:
        """Return the logits of tokens that follow those in the cache, and the cache with them."""
        x, new = self._stream(tokens, cache, None)
        assert new is not None
        return self.head(x), new

    def _stream(
        self, tokens: Int[Array, "B T"], cache: Cache | None, keys: jax.Array | None, remat: bool = False
    ) -> tuple[Float[Array, "B T C"], Cache | None]:
        T = tokens.shape[1]
        first, *layer_keys = _keys(keys, 1 + len(self.h))
        start = 0 if cache is None else cache.length
        x = self.wte(tokens)
        if self.learned:
            x = x + self.wpe(start + jnp.arange(T))[None]
        x = dropout(x, self.rate, first)
        cached_keys, cached_values = [], []
        for index, (block, layer_key) in enumerate(zip(self.h, layer_keys, strict=True)):
            layer = None if cache is None else (cache.keys[index], cache.values[index], cache.length)
            call = jax.checkpoint(functools.partial(_call, block)) if remat else block
            x, cached = call(x, layer, layer_key)
            if cached is not None:
                cached_keys.append(cached[0])
                cached_values.append(cached[1])
        if cache is None:
            return self.ln_f(x), None
        return self.ln_f(x), Cache(jnp.stack(cached_keys), jnp.stack(cached_values), cache.length + T)


def _call(block: Block, *arguments: Any) -> Any:
    return block(*arguments)


def logits_of(
    x: Float[Array, "N C"], table: Float[Array, "V2 C"], vocab_size: int, numerics: Numerics
) -> Float[Array, "N V2"]:
    """Return the logits of features; of rows that only pad the table, the lowest number there is."""
    logits = _matmul("NC,VC->NV", x, table, numerics)
    if len(table) == vocab_size:
        return logits
    real = jnp.arange(len(table))[None] < vocab_size
    return jnp.where(real, logits, jnp.finfo(logits.dtype).min)


def empty_cache(config: ModelConfig, batch: int, dtype: Any = jnp.float32) -> Cache:
    """Return a cache that holds no token yet, with room for block_size."""
    shape = (config.n_layer, batch, config.block_size, config.n_head, config.head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def graph_of(config: ModelConfig, numerics: Numerics = FLOAT32) -> nnx.GraphDef[GPT]:
    """Return the model's structure without any array."""
    abstract = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0), numerics))
    return nnx.split(abstract, nnx.Param)[0]


def init_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Return new parameters: flat, under GPT-2's names."""
    return params_of(GPT(config, nnx.Rngs(seed), Numerics(dtype, dtype)))


def pad_vocabulary(params: Params, multiple: int) -> Params:
    """Return parameters whose tables have rows of zeros up to a multiple."""
    tables = {name: params[name] for name in TABLES if name in params}
    padded = {name: jnp.pad(t, ((0, -t.shape[0] % multiple), (0, 0))) for name, t in tables.items()}
    return {**params, **padded}


def trim_vocabulary(params: Params, vocab_size: int) -> Params:
    """Return parameters without the rows that pad the tables."""
    return {name: array[:vocab_size] if name in TABLES else array for name, array in params.items()}


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and numerics of the parameters, nothing allocated."""
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
