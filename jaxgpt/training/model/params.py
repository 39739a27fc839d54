"""Parameters as a flat dict, under GPT-2's names: new ones, their shapes, padding, and back into a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.gpt import GPT
from jaxgpt.training.model.numerics import FLOAT32, Numerics

TABLES = ("wte.embedding", "lm_head.embedding")  # a row a token
Params = dict[str, jax.Array]
HostParam = npt.NDArray[np.float32]
HostParams = dict[str, HostParam]


@functools.lru_cache
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


def unpadded_shape(name: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Return the shape of a parameter without the rows that pad a table."""
    return (vocab_size, *shape[1:]) if name in TABLES else shape


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
