"""Dropout of a training: other activations are dropped each step, and by each layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model import attention, gpt, layers
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.model.params import graph_of, init_params, merge
from jaxgpt.training.step.compiled import CompiledTraining

MODEL = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
TRAIN = TrainConfig(max_steps=50, batch_size=4, warmup_steps=2)
SAME_STEP = 1e-6  # two roundings of a float32 loss of about 4; the same program gives the same bits here
ANOTHER_MASK = 2e-5  # forty of them; with weights as new as these masks change the loss by 3e-4 and more


def first_losses(dropout: float, *steps: int) -> list[float]:
    """The loss of one batch and the first parameters, in the steps of these numbers."""
    program = CompiledTraining(
        dataclasses.replace(MODEL, dropout=dropout), TRAIN, make_mesh("data=1", 1), FLOAT32
    )
    step = program.compile_step()
    tokens = np.random.default_rng(0).integers(64, size=(1, 4, 17)).astype(np.int32)
    batch = [jax.device_put(part, program.batch_sharding) for part in (tokens[..., :-1], tokens[..., 1:])]
    found = []
    for number in steps:
        state = program.first_state()  # donated to the step
        at = jax.device_put(jnp.full_like(state.step, number), program.shardings.step)
        found.append(float(step(state._replace(step=at), *batch)[1]["loss"]))
    return found


def test_a_training_drops_other_activations_in_every_step_and_the_same_when_it_is_repeated() -> None:
    first, again, second, third = first_losses(0.5, 0, 0, 1, 2)
    assert abs(first - again) <= SAME_STEP
    assert min(abs(first - second), abs(second - third), abs(first - third)) > ANOTHER_MASK
    plain, later = first_losses(0.0, 0, 1)
    assert abs(plain - later) <= SAME_STEP
    assert abs(first - plain) > ANOTHER_MASK


def test_every_layer_and_sequence_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with one key would drop the same channels."""
    keys: list[bytes] = []

    def dropout(x: Any, rate: float, given: Any) -> Any:
        keys.extend(key.tobytes() for key in np.asarray(jax.random.key_data(given)))
        return layers.dropout(x, rate, given)

    monkeypatch.setattr(gpt, "dropout", dropout)
    monkeypatch.setattr(attention, "dropout", dropout)
    config = dataclasses.replace(MODEL, dropout=0.5)
    model = merge(graph_of(config), init_params(config, 0))
    model(jnp.zeros((3, 16), jnp.int32), jax.random.split(jax.random.key(0), 3))
    # Three sequences: the embedding's; attention weights, attention and MLP of each block.
    assert len(keys) == 3 * (1 + 3 * MODEL.n_layer)
    assert len(set(keys)) == len(keys)
