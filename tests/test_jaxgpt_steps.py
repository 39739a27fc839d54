import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.mesh import batch_sharding, make_mesh, state_shardings
from jaxgpt.model import Params, graph_of, init_params, merge
from jaxgpt.optimizer import make_optimizer
from jaxgpt.steps import TrainState, make_eval_step, make_train_step, summed_loss

MODEL = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
# Small and fixed, so that rounding is not amplified from step to step.
TRAIN = TrainConfig(max_steps=20, batch_size=8, learning_rate=1e-3, embedding_rate=1e-3, warmup_steps=2)
STEPS = 20
FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of 20 steps, (20, 8, 16), some targets ignored."""
    random = np.random.default_rng(0)
    tokens = np.cumsum(random.integers(1, 3, size=(STEPS, 8, 17)), axis=-1).astype(np.int32) % 64
    targets = tokens[..., 1:].copy()
    targets[:, 3, 5:] = -1
    return tokens[..., :-1], targets


def start(train: TrainConfig, dtype: jnp.dtype) -> tuple[TrainState, optax.GradientTransformation]:
    params = init_params(MODEL, 0, dtype)
    optimizer = make_optimizer(train)
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key), optimizer


@cache
def losses(
    devices: int, mesh_text: str, dtype: jnp.dtype, train: TrainConfig = TRAIN, rate: float = 0.0
) -> np.ndarray:
    """Losses of 20 steps of jit over a mesh."""
    model = dataclasses.replace(MODEL, dropout=rate)
    state, optimizer = start(train, dtype)
    mesh = make_mesh(mesh_text, devices)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: state))
    state = jax.device_put(state, shardings)
    step = jax.jit(
        make_train_step(graph_of(model, dtype), optimizer, rate > 0), out_shardings=(shardings, None)
    )
    sharding = batch_sharding(mesh, axis=1, ndim=3)
    found = []
    for inputs, targets in zip(*batches(), strict=True):
        shape = (train.accumulate, 8 // train.accumulate, 16)
        placed = [jax.device_put(array.reshape(shape), sharding) for array in (inputs, targets)]
        state, metrics = step(state, *placed)
        found.append(float(metrics["loss"]))
    return np.array(found)


@cache
def pmap_losses(devices: int, dtype: jnp.dtype) -> np.ndarray:
    """Losses of the same steps written with jax.pmap: a gradient a device, psum, one update each."""
    state, optimizer = start(TRAIN, dtype)
    graph = graph_of(MODEL, dtype)

    @partial(jax.pmap, axis_name="devices")
    def step(params: Params, opt_state: object, inputs: jax.Array, targets: jax.Array) -> tuple[object, ...]:
        grad_fn = jax.value_and_grad(lambda p: summed_loss(graph, p, inputs, targets), has_aux=True)
        (loss, count), grads = grad_fn(params)
        loss, count, grads = jax.lax.psum((loss, count, grads), "devices")
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss / count

    def copies(tree: object) -> object:
        return jax.tree.map(lambda x: jnp.stack([x] * devices), tree)

    params, opt_state = copies(state.params), copies(state.opt_state)
    found = []
    for inputs, targets in zip(*batches(), strict=True):
        parts = [jnp.asarray(array.reshape(devices, 8 // devices, 16)) for array in (inputs, targets)]
        params, opt_state, loss = step(params, opt_state, *parts)
        found.append(float(loss[0]))
    return np.array(found)


LAYOUTS = [(2, ""), (8, ""), (8, "fsdp=8"), (8, "data=2,fsdp=4")]


@pytest.mark.parametrize(("devices", "mesh"), LAYOUTS)
def test_twenty_steps_lose_the_same_on_any_devices(devices: int, mesh: str) -> None:
    with jax.enable_x64(True):
        one = losses(1, "", jnp.float64)
        assert np.abs(losses(devices, mesh, jnp.float64) - one).max() <= FLOAT64_TOLERANCE
    assert one[-1] < one[0] - 0.1  # it learns: equal losses of a model that stands still would mean nothing
    one = losses(1, "", jnp.float32)
    assert np.abs(losses(devices, mesh, jnp.float32) - one).max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("devices", [2, 8])
def test_twenty_steps_lose_the_same_as_pmap(devices: int) -> None:
    with jax.enable_x64(True):
        difference = losses(devices, "", jnp.float64) - pmap_losses(devices, jnp.float64)
        assert np.abs(difference).max() <= FLOAT64_TOLERANCE
    difference = losses(devices, "", jnp.float32) - pmap_losses(devices, jnp.float32)
    assert np.abs(difference).max() <= FLOAT32_TOLERANCE


def test_micro_batches_count_by_their_tokens() -> None:
    with jax.enable_x64(True):
        whole = losses(1, "", jnp.float64)
        for accumulate in (2, 4, 8):
            parts = losses(1, "", jnp.float64, dataclasses.replace(TRAIN, accumulate=accumulate))
            assert np.abs(parts - whole).max() <= FLOAT64_TOLERANCE


def test_dropout_is_the_same_on_any_devices_and_differs_by_step() -> None:
    with jax.enable_x64(True):
        one = losses(1, "", jnp.float64, rate=0.3)
        assert np.abs(losses(8, "", jnp.float64, rate=0.3) - one).max() <= FLOAT64_TOLERANCE
        assert np.abs(one - losses(1, "", jnp.float64)).max() > 1e-3


def test_loss_is_the_float64_cross_entropy_of_the_counted_targets() -> None:
    params = init_params(MODEL, 0)
    inputs, targets = (array[0] for array in batches())
    total, count = make_eval_step(graph_of(MODEL))(params, jnp.asarray(inputs), jnp.asarray(targets))
    z = np.asarray(merge(graph_of(MODEL), params)(jnp.asarray(inputs)), np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(8) for t in range(16) if targets[b, t] >= 0)
    assert int(count) == (targets >= 0).sum() == 8 * 16 - 11
    assert abs(float(total) - expected) < 1e-3  # a sum of 117 float32 losses of about 4.2
