"""The first input scales of quantization-aware training, from what the float model's layers see.

Each layer takes the scale of least squared rounding error on some training sequences, among shares of the
one that clips nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from jaxgpt.shared.config import CLIPPING_SHARES, ModelConfig
from jaxgpt.shared.dataset import ShardedTokens, Tokens
from jaxgpt.training.batches import Batches
from jaxgpt.training.model.fake_quant import INPUT_SCALE, round_inputs, scale_of, without_scales
from jaxgpt.training.model.gpt import GPT
from jaxgpt.training.model.params import HostParams, Params, abstract_params, graph_of, init_params, merge

CALIBRATION_SEQUENCES = 8


def with_scales(
    config: ModelConfig, params: HostParams | None, tokens: Tokens | ShardedTokens, seed: int
) -> HostParams:
    """Return what a training with rounding begins with.

    Args:
      config: shape, with qat.
      params: with input scales, which stay, or without; None for new ones.
      tokens: the training split.
      seed: of new parameters, and of which sequences are looked at.
    """
    if params is None:
        params = without_scales(
            {name: np.asarray(array) for name, array in init_params(config, seed).items()}
        )
    if params.keys() == abstract_params(config).keys():
        return params
    sequences, _ = Batches(tokens, config.block_size, CALIBRATION_SEQUENCES, seed).at(0)
    return params | input_scales(config, params, sequences)


def input_scales(
    config: ModelConfig, host_params: HostParams, sequences: Int[np.ndarray, "N T"]
) -> HostParams:
    """Choose the input scales of a model.

    Args:
      config: shape, with qat.
      host_params: of the float model.
      sequences: tokens.

    Returns:
      "<layer>.input_scale" -> (), the same in every process.
    """
    graph = graph_of(config)
    names = [name for name in abstract_params(config) if name.endswith(INPUT_SCALE)]
    placed = {**host_params, **dict.fromkeys(names, np.ones((), np.float32))}
    params = jax.device_put(placed, jax.local_devices()[0])

    @jax.jit
    def largest(params: Params, tokens: Int[Array, "1 T"]) -> dict[str, Array]:
        return {name: jnp.max(jnp.abs(x)) for name, x in _layer_inputs(graph, params, tokens).items()}

    @jax.jit
    def errors(params: Params, tokens: Int[Array, "1 T"], scales: dict[str, Array]) -> dict[str, Array]:
        inputs = _layer_inputs(graph, params, tokens)
        return {name: _squared_errors(x, scales[name]) for name, x in inputs.items()}

    rows = [row[None] for row in sequences]
    tops = [largest(params, row) for row in rows]
    shares = jnp.array(CLIPPING_SHARES)
    tried = {name: scale_of(jnp.max(jnp.stack([top[name] for top in tops])) * shares) for name in names}
    found = [errors(params, row, tried) for row in rows]
    sums = {name: np.sum([np.asarray(error[name]) for error in found], axis=0) for name in names}
    scales = {name: np.asarray(tried[name][np.argmin(sums[name])]) for name in names}
    if jax.process_count() > 1:
        scales = {name: np.asarray(s) for name, s in multihost_utils.broadcast_one_to_all(scales).items()}
    return scales


def _layer_inputs(
    graph: nnx.GraphDef[GPT], params: Params, tokens: Int[Array, "1 T"]
) -> dict[str, Float[Array, "N I"]]:
    """Run the float model; return what each layer with an input scale saw, under that scale's name."""
    model = merge(graph, params)
    model.set_attributes(observing=True)
    _, seen = nnx.capture(nnx.Intermediate)(lambda model: model(tokens))(model)
    flat = nnx.to_flat_state(seen)
    return {".".join(map(str, (*path[:-1], INPUT_SCALE))): found.get_value()[0] for path, found in flat}


def _squared_errors(x: Float[Array, "N I"], scales: Float[Array, "K"]) -> Float[Array, "K"]:
    """Return the summed squared rounding error of each scale."""
    return jax.lax.map(lambda scale: jnp.sum((round_inputs(x, scale) * scale - x) ** 2), scales)
