"""Gradients of products in bfloat16 and float16, against float64."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model import numerics as numerics_module
from jaxgpt.training.model.fake_quant import FakeQuantLinear
from jaxgpt.training.model.layers import add_bias
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.numerics import TRAFFIC, Numerics, matmul
from jaxgpt.training.model.params import graph_of, init_params

MODEL = ModelConfig(vocab_size=64, block_size=32, n_layer=1, n_head=2, n_embd=32)
BF16 = Numerics(compute=jnp.bfloat16)
FP16 = Numerics(compute=jnp.float16, wide_sums=False, on_cpu=True)  # as a CPU computes it
CPU = Numerics(on_cpu=True)
ROUNDOFF = {jnp.dtype(jnp.bfloat16): 2.0**-9, jnp.dtype(jnp.float16): 2.0**-11}
# Some twenty roundings, of activations and on a gradient's way down, add up like sqrt(20); with a stream and
# logits that are rounded, too, some forty.
ROUNDINGS, ALL_ROUNDINGS = 5, 7


def gradients(numerics: Numerics, factor: float) -> dict[str, np.ndarray]:
    """Gradients of the loss of 256 tokens, whose logits differ by some nats, divided by the loss scale."""
    random = np.random.default_rng(0)
    tokens = jnp.asarray(np.cumsum(random.integers(1, 3, size=(8, 33)), axis=-1) % 64, jnp.int32)
    params = {
        name: array.astype(numerics.params) * (5 if array.ndim == 2 else 1)
        for name, array in init_params(MODEL, 0).items()
    }

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        graph = graph_of(MODEL, numerics)
        return (
            summed_loss(
                graph, params, tokens[:, :-1], tokens[:, 1:], factor=jnp.asarray(factor, numerics.params)
            )[0]
            * factor
        )

    found = jax.jit(jax.grad(loss))(params)
    return {name: np.asarray(gradient, np.float64) / factor for name, gradient in found.items()}


@pytest.fixture(scope="module")
def exact() -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return gradients(Numerics(jnp.float64, jnp.float64), 1.0)


@pytest.mark.parametrize(
    ("numerics", "factor", "roundings"),
    [
        (BF16, 1.0, ROUNDINGS),
        (BF16._replace(on_cpu=True), 1.0, ROUNDINGS),
        (BF16._replace(**dict.fromkeys(TRAFFIC, True)), 1.0, ALL_ROUNDINGS),
        (FP16, 2.0**15 / 256, ROUNDINGS),
    ],
)
def test_a_gradient_is_as_near_to_float64_as_its_dtype_allows(
    exact: dict[str, np.ndarray], numerics: Numerics, factor: float, roundings: int
) -> None:
    """With float16 the factor is what a step has: the first loss scale over the number of tokens."""
    found = gradients(numerics, factor)
    allowed = roundings * ROUNDOFF[jnp.dtype(numerics.compute)]
    for name, gradient in exact.items():
        error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert 0 < error < allowed, name


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8)])
def test_on_a_cpu_a_gradient_of_weights_is_formed_with_the_narrower_side_first(
    inputs: int, outputs: int
) -> None:
    random = np.random.default_rng(1)
    x, weights, wanted = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((64, inputs), (inputs, outputs), (64, outputs))
    )

    def loss(numerics: Numerics, weights: jax.Array) -> jax.Array:
        return jnp.sum(matmul("NI,IO->NO", x, weights, numerics) * wanted)

    gradient = jax.grad(partial(loss, CPU))
    products = re.findall(r"\[(\d+),(\d+)\] = dot_general", str(jax.make_jaxpr(gradient)(weights)))
    assert ("8", "24") in products
    assert ("24", "8") not in products
    exact = np.asarray(x, np.float64).T @ np.asarray(wanted, np.float64)
    assert np.abs(gradient(weights) - exact).max() < 1e-5  # 64 products of about 1, each off by 2^-24


def test_a_bias_s_gradient_is_summed_in_float32() -> None:
    ones = jnp.ones((4096, 3), jnp.bfloat16)
    _, backward = jax.vjp(add_bias, ones, jnp.zeros(3, jnp.float32))
    of_y, of_bias = backward(ones)
    assert of_bias.dtype == jnp.float32
    assert of_bias.tolist() == [4096.0] * 3
    assert of_y.dtype == jnp.bfloat16


def product_of_a_gpu(equation: str, a: Any, b: Any, numerics: Numerics, out: Any) -> jax.Array:
    """A product of float16 with float32 sums, which XLA's CPU backend has not."""
    rounded = (operand.astype(numerics.compute).astype(numerics.params) for operand in (a, b))
    return jnp.einsum(equation, *rounded).astype(out)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_gradients_of_a_fake_quantized_layer_are_as_near_as_its_dtype_allows(
    monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """Of small gradients, too: times both scales they would vanish in float16."""
    monkeypatch.setattr(numerics_module, "_product", product_of_a_gpu)
    random = np.random.default_rng(1)
    scale, size = np.float32(0.02), 1e-4
    x = random.normal(size=(64, 96)).astype(np.float32)
    kernel = (random.normal(size=(96, 48)) * 0.02).astype(np.float32)
    numerics = Numerics(compute=dtype)
    layer = FakeQuantLinear(96, 48, numerics, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.input_scale[...] = jnp.asarray(kernel), jnp.asarray(scale)
    graph, state = nnx.split(layer)
    g = jnp.asarray(random.normal(size=(64, 48)) * size, dtype)

    @jax.jit
    def gradients(state: nnx.State, x: jax.Array) -> Any:
        return jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)[1](g)

    of_state, of_x = gradients(state, jnp.asarray(x))

    exact_g = np.asarray(g, np.float64)
    w_scale = np.abs(kernel).max(0, keepdims=True) / np.float32(127)
    q_w = np.round(kernel / w_scale).astype(np.float64)
    ratio = (x / scale).astype(np.float64)
    q_x, inside = np.clip(np.round(ratio), -127, 127), np.abs(ratio) < 127
    of_rounded = exact_g @ (q_w * w_scale).T
    expected = {
        "x": of_rounded * inside,
        "kernel": (q_x * scale).T @ exact_g,
        "bias": exact_g.sum(0),
        "input_scale": (of_rounded * np.where(inside, q_x - ratio, q_x)).sum(),
    }
    found = {"x": of_x, **{name: of_state[name][...] for name in ("kernel", "bias", "input_scale")}}
    for name, gradient in expected.items():
        error = np.linalg.norm(np.asarray(found[name], np.float64) - gradient) / np.linalg.norm(gradient)
        assert error < ROUNDINGS * ROUNDOFF[jnp.dtype(dtype)], name
