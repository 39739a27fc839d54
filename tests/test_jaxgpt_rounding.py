"""Rounding as the static INT8 artifact does it, against NumPy: integers, a whole model, gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.shared.config import CLIPPING_SHARES, ModelConfig, TrainConfig
from jaxgpt.training.devices.mesh import make_mesh, state_shardings
from jaxgpt.training.model.fake_quant import FakeQuantLinear, round_inputs, round_weight, without_scales
from jaxgpt.training.model.gpt import empty_cache
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.numerics import Numerics
from jaxgpt.training.model.params import graph_of, init_params, merge, pad_vocabulary, trim_vocabulary
from jaxgpt.training.model.qat_scales import input_scales
from jaxgpt.training.step.gradients import make_gradients

MODEL = ModelConfig(vocab_size=50, block_size=12, n_layer=2, n_head=2, n_embd=16, qat=True)
SMALLEST_NORMAL = 2.0**-126
FLOAT64_TOLERANCE = 1e-5  # of logits of about 3 in float32


def numpy_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and steps of the rows of (O, I), as model/arithmetic.py writes them, in w's precision."""
    largest = np.abs(w).max(axis=1, keepdims=True)
    scale = np.maximum(largest / w.dtype.type(127), w.dtype.type(SMALLEST_NORMAL))
    return np.round(w / scale), scale


def test_rows_round_to_numpy_s_integers_and_steps_under_jit_at_any_size() -> None:
    random = np.random.default_rng(0)
    size = 10.0 ** random.uniform(-38, 30, size=(16_384, 1))
    w = (random.normal(size=(16_384, 160)) * size).astype(np.float32)
    w[np.abs(w) < SMALLEST_NORMAL] = 0.0  # which XLA takes for 0
    w[5] = 0.0
    w[6, :3] = 127.0, 0.5, 1.5  # halves, to even
    q, scale = numpy_rows(w)
    found_q, found_scale = jax.jit(lambda w: round_weight(w, 1))(w)
    assert np.array_equal(found_scale, scale)
    assert np.array_equal(found_q, q)
    assert np.abs(q).max() == 127
    columns_q, columns_scale = jax.jit(lambda w: round_weight(w, 0))(w.T.copy())
    assert np.array_equal(columns_scale.T, scale)
    assert np.array_equal(columns_q.T, q)


@pytest.mark.parametrize("constant", [False, True])
def test_inputs_round_to_numpy_s_integers_under_jit(constant: bool) -> None:
    """A step that is an argument, or that the compiler knows, is divided by all the same."""
    random = np.random.default_rng(1)
    x = random.normal(size=1_000_000).astype(np.float32)
    traced = jax.jit(round_inputs)
    for exponent in (-36.0, -7.3, -2.1, -1.7, -0.4, 3.0, 25.0):
        scale = np.float32(10.0**exponent)
        y = x * np.float32(30) * scale if abs(exponent) > 5 else x
        expected = np.clip(np.round(y / scale), -127, 127)
        found = (
            jax.jit(lambda y, s=scale: round_inputs(y, jnp.asarray(s)))(y) if constant else traced(y, scale)
        )
        assert np.array_equal(found, expected)


def test_the_gradient_of_the_step_is_lsq_s() -> None:
    random = np.random.default_rng(2)
    x, g, s = random.normal(size=(7, 9)) * 40, random.normal(size=(7, 9)), 0.21
    with jax.enable_x64(True):

        def loss(x: jax.Array, s: jax.Array) -> jax.Array:
            return jnp.sum(round_inputs(x, s) * s * g)

        of_x, of_s = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(s))
    inside = np.abs(x / s) < 127
    assert 10 < inside.sum() < 60
    assert np.allclose(of_x, g * inside, atol=1e-12)
    terms = np.where(inside, np.round(x / s) - x / s, 127 * np.sign(x))
    assert float(of_s) == pytest.approx((terms * g).sum(), rel=1e-12)


def linear(dtype: Any, features: int = 96) -> FakeQuantLinear:
    """A layer with random weights, biases and step."""
    init = nnx.initializers.normal(0.1)
    layer = FakeQuantLinear(features, 5, Numerics(compute=dtype), kernel_init=init, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    layer.input_scale[...] = jnp.float32(0.013)
    return layer


def test_bfloat16_products_of_integers_are_exact() -> None:
    """What is left of bfloat16 is the rounding of the output."""
    x = jax.random.normal(jax.random.key(0), (64, 96))
    plain, low = linear(jnp.float32)(x), linear(jnp.bfloat16)(x)
    assert low.dtype == jnp.bfloat16
    assert np.array_equal(low, plain.astype(jnp.bfloat16))


def test_a_weight_s_gradient_is_that_of_the_rounded_input() -> None:
    x, layer = jax.random.normal(jax.random.key(0), (64, 96)), linear(jnp.float32)
    g = jax.random.normal(jax.random.key(1), (64, 5))
    graph, state = nnx.split(layer)
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x) * g))(state)
    rounded = np.clip(np.round(np.asarray(x) / np.float32(0.013)), -127, 127) * 0.013
    # sums of 64 float32 products
    assert np.abs(gradient["kernel"][...] - rounded.T @ np.asarray(g)).max() < 1e-4


def random_params(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters without a zero among them, with input steps that clip a little."""
    random = np.random.default_rng(seed)
    params = {}
    for name, array in init_params(model, 0).items():
        if name.endswith("input_scale"):
            params[name] = np.float32(random.uniform(0.012, 0.02) * (0.2 if "c_proj" in name else 1))
        else:
            noise = random.normal(size=array.shape) * 0.2
            params[name] = (noise + (1.0 if ".scale" in name else 0.0)).astype(np.float32)
    return params


def on_device(params: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in params.items()}


def logits(model: ModelConfig, params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    return jax.jit(lambda params, tokens: merge(graph_of(model), params)(tokens))(params, tokens)


class NumpyModel:
    """GPT-2 with the artifact's arithmetic: integer sums, all else in float64."""

    def __init__(self, model: ModelConfig, params: dict[str, np.ndarray]) -> None:
        self.model, self.params = model, params
        self.clipped = 0

    def linear(self, name: str, x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        weight = self.params[f"{name}.kernel"].T if weight is None else weight
        q_w, s_w = numpy_rows(weight)
        s_x = float(self.params[f"{name}.input_scale"])
        q_x = np.clip(np.round(x / s_x), -127, 127).astype(np.int64)
        self.clipped += int((np.abs(q_x) == 127).sum())
        y = (q_x @ q_w.T.astype(np.int64)) * (s_x * s_w.astype(np.float64)[:, 0])
        return y + self.params.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return x * self.params[f"{name}.scale"] + self.params[f"{name}.bias"]

    def embedding(self, name: str) -> np.ndarray:
        q, s = numpy_rows(self.params[f"{name}.embedding"])
        return q.astype(np.float64) * s

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        T, H = len(tokens), self.model.n_head
        x = self.embedding("wte")[tokens] + self.embedding("wpe")[:T]
        for layer in range(self.model.n_layer):
            at = f"h.{layer}"
            qkv = self.linear(f"{at}.attn.c_attn", self.norm(f"{at}.ln_1", x))
            q, k, v = (part.reshape(T, H, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=1))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            scores = np.where(np.tril(np.ones((T, T))) > 0, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (weights / weights.sum(-1, keepdims=True)) @ v
            x = x + self.linear(f"{at}.attn.c_proj", mixed.transpose(1, 0, 2).reshape(T, -1))
            inner = self.linear(f"{at}.mlp.c_fc", self.norm(f"{at}.ln_2", x))
            inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
            x = x + self.linear(f"{at}.mlp.c_proj", inner)
        table = self.params["wte.embedding" if self.model.tied else "lm_head.embedding"]
        return self.linear("lm_head", self.norm("ln_f", x), table)


class FloatModel(NumpyModel):
    """The same in float64 throughout; it keeps what enters each layer."""

    def __init__(self, model: ModelConfig, params: dict[str, np.ndarray]) -> None:
        super().__init__(model, params)
        self.seen: dict[str, list[np.ndarray]] = {}

    def linear(self, name: str, x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        self.seen.setdefault(name, []).append(x)
        weight = self.params[f"{name}.kernel"].T if weight is None else weight
        return x @ weight.T.astype(np.float64) + self.params.get(f"{name}.bias", 0.0)

    def embedding(self, name: str) -> np.ndarray:
        return self.params[f"{name}.embedding"].astype(np.float64)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_what_the_artifact_s_arithmetic_says(tied: bool) -> None:
    model = dataclasses.replace(MODEL, tied=tied)
    params = random_params(model)
    tokens = np.random.default_rng(3).integers(50, size=12)
    reference = NumpyModel(model, params)
    expected = reference.logits(tokens)
    assert reference.clipped > 20
    batch, arrays = jnp.asarray(tokens)[None], on_device(params)
    found = logits(model, arrays, batch)[0]
    assert np.abs(found - expected).max() < FLOAT64_TOLERANCE
    plain = logits(dataclasses.replace(model, qat=False), without_scales(arrays), batch)[0]
    assert np.abs(plain - expected).max() > 0.01


def test_loss_and_generation_round_as_the_logits_do() -> None:
    params = on_device(random_params(MODEL))
    tokens = jnp.asarray(np.random.default_rng(4).integers(50, size=(2, 12)))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected_logits = logits(MODEL, params, inputs)
    log_p = jax.nn.log_softmax(expected_logits)
    expected = -float(jnp.take_along_axis(log_p, targets[..., None], axis=-1).sum())
    loss, _ = jax.jit(functools.partial(summed_loss, graph_of(MODEL), chunks=2))(params, inputs, targets)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    generate = jax.jit(lambda params, *rest: merge(graph_of(MODEL), params).with_cache(*rest))
    cache, parts = empty_cache(MODEL, 2), []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        part, cache = generate(params, inputs[:, start:stop], cache)
        parts.append(part)
    assert np.abs(np.concatenate(parts, axis=1) - expected_logits).max() < FLOAT64_TOLERANCE


@pytest.mark.slow
def test_gradients_are_the_same_on_any_devices() -> None:
    model = dataclasses.replace(MODEL, tied=False, vocab_size=48, n_layer=1)
    train = TrainConfig(batch_size=16, grad_accum_steps=2, remat=True, loss_chunks=3)
    random = np.random.default_rng(5)
    tokens = random.integers(48, size=(2, 8, 13)).astype(np.int32)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(a, jnp.float64) for name, a in random_params(model).items()}

        def gradients(text: str, count: int) -> dict[str, np.ndarray]:
            layout = make_mesh(text, count)
            graph = graph_of(model, Numerics(jnp.float64, jnp.float64))
            placed = jax.device_put(params, state_shardings(layout, params))
            key = jax.random.key_data(jax.random.key(0))
            found = jax.jit(make_gradients(graph, layout, train, dropout=False))(
                placed, jnp.ones(()), key, tokens[..., :-1], tokens[..., 1:]
            )
            return {name: np.asarray(gradient) for name, gradient in found[2].items()}

        one, many = gradients("", 1), gradients("data=2,fsdp=2", 4)
    assert all(np.abs(one[name]).max() > 1e-6 for name in one)
    for name in one:
        assert np.abs(one[name] - many[name]).max() < 1e-9 * np.abs(one[name]).max()


def test_each_layer_s_first_step_has_the_least_squared_error_of_the_float_model_s_inputs() -> None:
    model = dataclasses.replace(MODEL, n_layer=1)
    params = without_scales(random_params(model))
    sequences = np.random.default_rng(6).integers(50, size=(3, 12)).astype(np.int32)
    scales = input_scales(model, params, sequences)
    assert scales.keys() == {
        f"{layer}.input_scale"
        for layer in ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj", "lm_head")
    }
    reference = FloatModel(model, params)
    for row in sequences:
        reference.logits(row)
    assert {f"{layer}.input_scale" for layer in reference.seen} == scales.keys()
    for layer, parts in reference.seen.items():
        x = np.concatenate(parts)
        steps = np.abs(x).max() / 127 * np.array(CLIPPING_SHARES)
        errors = [((np.clip(np.round(x / s), -127, 127) * s - x) ** 2).sum() for s in steps]
        # The largest input in float32, after a block's sums.
        assert scales[f"{layer}.input_scale"] == pytest.approx(steps[np.argmin(errors)], rel=1e-5), layer


def test_a_head_of_its_own_is_drawn_padded_and_trimmed() -> None:
    model = dataclasses.replace(MODEL, tied=False, qat=False)
    params = init_params(dataclasses.replace(model, vocab_size=4000), 0)
    assert params["lm_head.embedding"].shape == (4000, 16)
    assert float(params["lm_head.embedding"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(jnp.abs(params["lm_head.embedding"] - params["wte.embedding"]).max()) > 0.01
    params = init_params(model, 0)
    padded = pad_vocabulary(params, 64)
    assert padded["lm_head.embedding"].shape == padded["wte.embedding"].shape == (64, 16)
    tokens = jnp.arange(12)[None]
    plain, wide = (merge(graph_of(model), p)(tokens) for p in (params, padded))
    # Each logit is 16 products of a unit-variance vector (length 4) and a row of the head; a wider
    # matmul may add them in another order, which moves a sum by at most 16 eps times the lengths.
    longest = float(jnp.linalg.norm(params["lm_head.embedding"], axis=-1).max())
    assert np.abs(plain - wide[..., :50]).max() <= 16 * np.finfo(np.float32).eps * 4 * longest
    assert (wide[..., 50:] == jnp.finfo(jnp.float32).min).all()
    trimmed = trim_vocabulary(padded, 50)
    assert all(np.array_equal(trimmed[name], params[name]) for name in params)
    tied = init_params(dataclasses.replace(model, tied=True), 0)
    assert all(np.array_equal(tied[name], params[name]) for name in tied)
