import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxgpt.shared.config import ModelConfig, Precision, TrainConfig
from jaxgpt.training.devices.mesh import batch_sharding, make_mesh, state_shardings
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.numerics import Numerics, choose_numerics
from jaxgpt.training.model.params import Params, graph_of, init_params, merge
from jaxgpt.training.step.gradients import make_gradients
from jaxgpt.training.step.optimizer import make_optimizer
from jaxgpt.training.step.state import TrainState, first_state
from jaxgpt.training.step.train_step import make_eval_step, make_train_step

MODEL = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
# Small and fixed, so that rounding is not amplified from step to step.
TRAIN = TrainConfig(
    max_steps=50, batch_size=8, learning_rate=1e-3, embedding_learning_rate=1e-3, warmup_steps=2
)
STEPS = 50
FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of 50 steps, (50, 8, 16), some targets ignored."""
    random = np.random.default_rng(0)
    tokens = np.cumsum(random.integers(1, 3, size=(STEPS, 8, 17)), axis=-1).astype(np.int32) % 64
    targets = tokens[..., 1:].copy()
    targets[:, 3, 5:] = -1
    return tokens[..., :-1], targets


def start(
    train: TrainConfig, dtype: jnp.dtype, mesh: Mesh | None = None
) -> tuple[TrainState, optax.GradientTransformation]:
    params = init_params(MODEL, 0, dtype)
    optimizer = make_optimizer(train, MODEL, mesh)
    return first_state(params, optimizer, 0, train), optimizer


@cache
def losses(
    devices: int,
    mesh_text: str,
    dtype: jnp.dtype,
    train: TrainConfig = TRAIN,
    rate: float = 0.0,
    on_cpu: bool = False,
) -> np.ndarray:
    """Losses of 50 steps of jit over a mesh."""
    model = dataclasses.replace(MODEL, dropout=rate)
    mesh = make_mesh(mesh_text, devices)
    state, optimizer = start(train, dtype, mesh if on_cpu or mesh.shape["fsdp"] > 1 else None)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: state))
    state = jax.device_put(state, shardings)
    graph = graph_of(model, Numerics(dtype, dtype, on_cpu=on_cpu))
    step = jax.jit(make_train_step(graph, optimizer, mesh, train, rate > 0), out_shardings=(shardings, None))
    sharding = batch_sharding(mesh, axis=1, ndim=3)
    found = []
    for inputs, targets in zip(*batches(), strict=True):
        shape = (train.grad_accum_steps, 8 // train.grad_accum_steps, 16)
        placed = [jax.device_put(array.reshape(shape), sharding) for array in (inputs, targets)]
        state, metrics = step(state, *placed)
        found.append(float(metrics["loss"]))
    return np.array(found)


@cache
def pmap_losses(devices: int, dtype: jnp.dtype) -> np.ndarray:
    """Losses of the same steps written with jax.pmap: a gradient a device, psum, one update each."""
    state, optimizer = start(TRAIN, dtype)
    graph = graph_of(MODEL, Numerics(dtype, dtype))

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


LAYOUTS = [pytest.param(2, "", marks=pytest.mark.slow), (8, ""), (8, "fsdp=8"), (8, "data=2,fsdp=4")]


@pytest.mark.parametrize(("devices", "mesh"), LAYOUTS)
def test_fifty_steps_lose_the_same_on_any_devices(devices: int, mesh: str) -> None:
    with jax.enable_x64(True):
        one = losses(1, "", jnp.float64)
        assert np.abs(losses(devices, mesh, jnp.float64) - one).max() <= FLOAT64_TOLERANCE
    assert one[-1] < one[0] - 0.1  # it learns: equal losses of a model that stands still would mean nothing
    one = losses(1, "", jnp.float32)
    assert np.abs(losses(devices, mesh, jnp.float32) - one).max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_fifty_steps_lose_the_same_as_pmap(devices: int) -> None:
    with jax.enable_x64(True):
        difference = losses(devices, "", jnp.float64) - pmap_losses(devices, jnp.float64)
        assert np.abs(difference).max() <= FLOAT64_TOLERANCE
    difference = losses(devices, "", jnp.float32) - pmap_losses(devices, jnp.float32)
    assert np.abs(difference).max() <= FLOAT32_TOLERANCE


def test_fifty_steps_of_muon_lose_the_same_where_devices_of_a_cpu_share_its_matrices() -> None:
    train = dataclasses.replace(TRAIN, optimizer="muon", learning_rate=0.02, split_qkv=True)
    with jax.enable_x64(True):
        plain = losses(1, "", jnp.float64, train)
        for devices in (1, 8):
            found = losses(devices, "", jnp.float64, train, on_cpu=True)
            assert np.abs(found - plain).max() <= FLOAT64_TOLERANCE
        assert plain[-1] < plain[0] - 0.5


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4"])
def test_fifty_steps_of_muon_lose_the_same_where_devices_hold_parts_of_its_matrices(mesh: str) -> None:
    train = dataclasses.replace(TRAIN, optimizer="muon", learning_rate=0.02, split_qkv=True)
    with jax.enable_x64(True):
        plain = losses(1, "", jnp.float64, train)
        assert np.abs(losses(8, mesh, jnp.float64, train) - plain).max() <= FLOAT64_TOLERANCE


def test_micro_batches_count_by_their_tokens() -> None:
    with jax.enable_x64(True):
        whole = losses(1, "", jnp.float64)
        for accumulate in (2, 4, 8):
            parts = losses(1, "", jnp.float64, dataclasses.replace(TRAIN, grad_accum_steps=accumulate))
            assert np.abs(parts - whole).max() <= FLOAT64_TOLERANCE


@pytest.mark.slow
def test_dropout_is_the_same_on_any_devices_and_differs_by_step() -> None:
    with jax.enable_x64(True):
        one = losses(1, "", jnp.float64, rate=0.3)
        assert np.abs(losses(8, "", jnp.float64, rate=0.3) - one).max() <= FLOAT64_TOLERANCE
        assert np.abs(one - losses(1, "", jnp.float64)).max() > 1e-3


@cache
def dropout_gradients(mesh: str, devices: int) -> Callable[..., Any]:
    """The compiled gradients of a model with dropout 0.5, in float64, as a function of the batch."""
    model = dataclasses.replace(MODEL, dropout=0.5)
    graph, layout = graph_of(model, Numerics(jnp.float64, jnp.float64)), make_mesh(mesh, devices)
    params = init_params(model, 0, jnp.float64)
    placed = jax.device_put(params, state_shardings(layout, params))
    gradients = jax.jit(make_gradients(graph, layout, TRAIN, dropout=True))
    return partial(gradients, placed, jnp.ones(()), jax.random.key_data(jax.random.key(7)))


def dropout_loss(
    mesh: str, devices: int, inputs: np.ndarray, targets: np.ndarray, accumulate: int = 1
) -> float:
    """The summed loss of one batch with dropout 0.5, in float64."""
    shape = (accumulate, len(inputs) // accumulate, -1)
    loss, _, _ = dropout_gradients(mesh, devices)(inputs.reshape(shape), targets.reshape(shape))
    return float(loss)


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2"])
def test_each_device_drops_other_activations_and_those_of_one_device_that_has_the_whole_batch(
    mesh: str,
) -> None:
    """Both halves of the batch hold the same tokens: with the same keys their losses would be equal."""
    inputs, targets = (np.concatenate([array[0][:2], array[0][:2]]) for array in batches())
    first, second = targets.copy(), targets.copy()
    first[2:], second[:2] = -1, -1  # a half counts alone
    with jax.enable_x64(True):
        halves = [dropout_loss(mesh, 2, inputs, counted) for counted in (first, second)]
        assert abs(halves[0] - halves[1]) > 1e-3
        whole = dropout_loss(mesh, 2, inputs, targets)
        assert abs(whole - sum(halves)) <= FLOAT64_TOLERANCE
        assert abs(whole - dropout_loss("", 1, inputs, targets)) <= FLOAT64_TOLERANCE


def test_each_micro_batch_drops_other_activations() -> None:
    inputs, targets = (np.concatenate([array[0][:2], array[0][:2]]) for array in batches())
    with jax.enable_x64(True):
        whole = dropout_loss("", 1, inputs, targets)
        assert abs(dropout_loss("", 1, inputs, targets, accumulate=2) - whole) <= FLOAT64_TOLERANCE


def test_loss_is_the_float64_cross_entropy_of_the_counted_targets() -> None:
    params = init_params(MODEL, 0)
    inputs, targets = (array[0] for array in batches())
    total, count = make_eval_step(graph_of(MODEL))(params, jnp.asarray(inputs), jnp.asarray(targets))
    z = np.asarray(merge(graph_of(MODEL), params)(jnp.asarray(inputs)), np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(8) for t in range(16) if targets[b, t] >= 0)
    assert int(count) == (targets >= 0).sum() == 8 * 16 - 11
    assert abs(float(total) - expected) < 1e-3  # a sum of 117 float32 losses of about 4.2


@cache
def plain_metrics() -> list[dict[str, float]]:
    """What undisturbed steps in float32 report."""
    return run_steps(TRAIN)[1]


def run_steps(
    train: TrainConfig, poison: tuple[int, ...] = (), steps: int = STEPS
) -> tuple[TrainState, list[dict[str, float]], list[TrainState]]:
    """Train; the parameters of the steps in `poison` get one NaN before, and are mended after."""
    state, optimizer = start(train, jnp.float32)
    mesh = make_mesh("", 1)
    step = jax.jit(
        make_train_step(
            graph_of(MODEL, choose_numerics(MODEL, train, "cpu", 0.0)[0]), optimizer, mesh, train, False
        )
    )
    metrics, states = [], [state]
    for index, (inputs, targets) in enumerate(zip(*batches(), strict=True)):
        if index == steps:
            break
        good = state.params
        if index in poison:
            bad = good["wpe.embedding"].at[0, 0].set(jnp.nan)
            state = state._replace(params={**good, "wpe.embedding": bad})
        state, found = step(state, inputs[None], targets[None])
        if index in poison:
            assert np.isnan(state.params["wpe.embedding"][0, 0])  # not applied: the NaN is still the only one
            assert sum(int(jnp.isnan(leaf).sum()) for leaf in state.params.values()) == 1
            state = state._replace(params=good)
        metrics.append({name: float(value) for name, value in found.items()})
        states.append(state)
    return state, metrics, states


def test_a_step_that_is_not_finite_is_counted_and_never_applied() -> None:
    state, metrics, states = run_steps(TRAIN, poison=(3, 4, 7))
    assert [m["skipped"] for m in metrics][:9] == [0, 0, 0, 1, 2, 2, 2, 3, 3]
    assert [m["skipped_in_row"] for m in metrics][:9] == [0, 0, 0, 1, 2, 0, 0, 1, 0]
    for index in (3, 4, 7):
        before, after = states[index], states[index + 1]
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()),
            (before.params, before.opt_state),
            (after.params, after.opt_state),
        )
        assert all(jax.tree.leaves(same))
    assert int(state.step) == STEPS
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_loss_scale_halves_on_overflow_grows_after_good_steps_and_leaves_the_gradient_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxgpt.training.step.guard.GROWTH_STEPS", 5)
    train = dataclasses.replace(TRAIN, precision="fp16")
    _, metrics, _ = run_steps(train, poison=(2,))
    scales = [m["loss_scale"] for m in metrics]
    assert scales[:2] == [2.0**15] * 2
    assert scales[2:7] == [2.0**14] * 5
    assert scales[7:12] == [2.0**15] * 5
    plain = plain_metrics()
    # The gradient of the first step, after unscaling: float16 has 11 bits.
    assert metrics[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_stay_near_float32(precision: Precision) -> None:
    plain = plain_metrics()
    state, low, _ = run_steps(dataclasses.replace(TRAIN, precision=precision))
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("float32")}
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, low, strict=True))
    assert 0 < off < (0.02 if precision == "bf16" else 0.003)  # 8 and 11 bits, relative to a loss of 4
    assert low[-1]["skipped"] == 0


def test_spike_guard_skips_a_loss_far_above_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxgpt.training.step.guard.SPIKE_WARMUP", 5)
    monkeypatch.setattr("jaxgpt.training.step.guard.SPIKE_MEMORY", 0.5)
    train = dataclasses.replace(TRAIN, spike_guard=6.0, learning_rate=0.01, embedding_learning_rate=0.01)
    state, optimizer = start(train, jnp.float32)
    step = jax.jit(make_train_step(graph_of(MODEL), optimizer, make_mesh("", 1), train, False))
    inputs, targets = batches()
    random = np.random.default_rng(1).integers(64, size=(8, 16))  # nothing that could be learned
    skipped = []
    for index in range(16):
        wanted = random if index == 12 else targets[0]
        state, metrics = step(state, inputs[:1], wanted[None].astype(np.int32))
        skipped.append(int(metrics["skipped"]))
    assert skipped == [0] * 12 + [1] * 4
