"""A Flax model as a session, with a KV cache: `jaxgpt sample` and a training's samples generate with it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.gpt import KVCache, empty_cache
from jaxgpt.training.model.params import Params, graph_of, merge

PREFILL_MULTIPLE = 32  # prompts are padded to a multiple, so that few lengths are compiled


@functools.lru_cache(maxsize=4)
def _programs(config: ModelConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what takes a prompt and what takes a token: compiled once for all samples of a training."""
    graph = graph_of(config)

    def prefill(
        params: Params, tokens: Int[Array, "B T"], length: Int[Array, ""]
    ) -> tuple[Float[Array, "V"], KVCache]:
        cache = empty_cache(config, 1, params["wte.embedding"].dtype)
        logits, cache = merge(graph, params).with_cache(tokens, cache)
        # What the padding wrote lies beyond the length: it is overwritten before it is visible.
        return logits[0, length - 1], cache._replace(length=length)

    def decode_one_token(
        params: Params, token: Int[Array, ""], cache: KVCache
    ) -> tuple[Float[Array, "V"], KVCache]:
        logits, cache = merge(graph, params).with_cache(token[None, None], cache)
        return logits[0, 0], cache

    return jax.jit(prefill), jax.jit(decode_one_token, donate_argnums=2)


class FlaxSession:
    """A Flax GPT-2 that remembers the tokens it was given: a generation.session.Session.

    Args:
      config: shape.
      params: parameters, on one device.

    Attributes:
      block_size: how many tokens it can hold.
    """

    def __init__(self, config: ModelConfig, params: Params) -> None:
        self.block_size = config.block_size
        self._params = params
        self._prefill, self._decode = _programs(config)
        self._cache: KVCache | None = None

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take a prompt of 1 to block_size tokens; return the logits (V,) after it."""
        length = len(tokens)
        padded = min(-(-length // PREFILL_MULTIPLE) * PREFILL_MULTIPLE, self.block_size)
        array = np.zeros((1, padded), np.int32)
        array[0, :length] = tokens
        logits, self._cache = self._prefill(self._params, array, jnp.int32(length))
        return np.asarray(logits)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it."""
        assert self._cache is not None, "prefill() comes first"
        logits, self._cache = self._decode(self._params, jnp.int32(token), self._cache)
        return np.asarray(logits)
