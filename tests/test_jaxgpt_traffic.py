"""The switches that move fewer bytes through a GPU's memory: same gradients, and what they save is gone."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_jaxgpt_lowering import TURING, lowered, signatures
from test_jaxgpt_precision import BF16, MODEL, ROUNDINGS, ROUNDOFF

from jaxgpt.shared.architecture import LAYER_NORM_EPSILON
from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.model import fused
from jaxgpt.training.model.layers import Linear
from jaxgpt.training.model.loss import HeadSettings, head_loss, summed_loss
from jaxgpt.training.model.numerics import TRAFFIC, Numerics, choose_numerics
from jaxgpt.training.model.params import abstract_params, graph_of

B, T, C = 4, MODEL.block_size, MODEL.n_embd


def switched(*names: str) -> Numerics:
    return BF16._replace(**dict.fromkeys(names, True))


def kept(*names: str) -> Counter[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what the forward pass keeps for the backward pass, by how often."""
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        graph = graph_of(MODEL, switched(*names))
        return jax.vjp(lambda params: summed_loss(graph, params, inputs, targets)[0], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(forward, abstract_params(MODEL), tokens, tokens))
    return Counter((leaf.shape, leaf.dtype.name) for leaf in leaves)


def relative_error(found: Any, exact: Any) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_they_are_chosen_by_the_settings_and_float32_has_none() -> None:
    for name in TRAFFIC:
        settings = TrainConfig(precision="bf16", **{name: True})
        chosen, _ = choose_numerics(MODEL, settings, "cpu", 0.0)
        assert {each for each in TRAFFIC if getattr(chosen, each)} == {name}
        plain, _ = choose_numerics(MODEL, dataclasses.replace(settings, precision="fp32"), "cpu", 0.0)
        assert plain == Numerics(on_cpu=True)


def test_the_fused_layer_norm_is_layer_norm() -> None:
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, g = (jnp.asarray(random.normal(size=(3, 5, 16)) * 4 + 2) for _ in range(2))
        scale, bias = (jnp.asarray(random.normal(size=16)) for _ in range(2))

        def reference(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            variance = jnp.var(x, axis=-1, keepdims=True)
            y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + LAYER_NORM_EPSILON)
            return y * scale[None, None] + bias[None, None]

        expected, of_expected = jax.vjp(reference, x, scale, bias)
        found, of_found = jax.vjp(lambda *each: fused.layer_norm(*each, x.dtype), x, scale, bias)
        assert relative_error(found, expected) < 1e-12
        for mine, theirs in zip(of_found(g), of_expected(g), strict=True):
            assert relative_error(mine, theirs) < 1e-12
    y, backward = jax.vjp(
        lambda *each: fused.layer_norm(*each, jnp.bfloat16), *map(jnp.float32, (x, scale, bias))
    )
    assert y.dtype == jnp.bfloat16
    assert [each.dtype for each in backward(y)] == [jnp.float32] * 3


def test_the_fused_gelu_is_gelu() -> None:
    x, g = jnp.linspace(-12, 12, 1001), jnp.linspace(1, 2, 1001)
    expected, of_expected = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), x)
    found, of_found = jax.vjp(fused.gelu, x)
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(of_found(g)[0] - of_expected(g)[0]).max() < 2e-6


def test_three_products_are_the_parts_of_one() -> None:
    layer = Linear(C, 3 * C, BF16, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(3.0 * C)
    graph, state = nnx.split(layer)
    x, g = (jax.random.normal(jax.random.key(i), (64, n), jnp.bfloat16) for i, n in enumerate((C, 3 * C)))

    def one(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    def three(state: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate(nnx.merge(graph, state).thirds(x), axis=1)

    (y, whole), (parts, apart) = jax.vjp(one, state, x), jax.vjp(three, state, x)
    assert (y == parts).all()
    (of_one, of_x), (of_three, of_parts) = whole(g), apart(g)
    assert all(relative_error(of_three[name][...], of_one[name][...]) < 1e-6 for name in ("kernel", "bias"))
    assert relative_error(of_parts, of_x) < ROUNDINGS * ROUNDOFF[jnp.dtype(jnp.bfloat16)]


def test_low_precision_logits_cost_the_loss_and_its_gradient_their_rounding_and_no_more() -> None:
    """And nothing where the loss is not differentiated: validation."""
    random = np.random.default_rng(0)
    x, table = random.normal(size=(B, 64, C)), random.normal(size=(MODEL.vocab_size, C))
    targets = jnp.asarray(random.integers(-1, MODEL.vocab_size, size=(B, 64)))

    def run(numerics: Numerics) -> tuple[Any, Any, Any]:
        arrays = (jnp.asarray(each, numerics.params) for each in (x, table))
        settings, one = HeadSettings(MODEL.vocab_size, numerics, 4), jnp.ones((), numerics.params)
        call = lambda x, table: head_loss(settings, x, table, targets, one)  # noqa: E731
        x_array, table_array = arrays
        loss, of_both = jax.value_and_grad(call, (0, 1))(x_array, table_array)
        return float(call(x_array, table_array)), float(loss), of_both

    with jax.enable_x64(True):
        _, loss, of_both = run(Numerics(jnp.float64, jnp.float64))
    validation, low_loss, low_of_both = run(switched("low_precision_logits"))
    assert validation == run(BF16)[0]
    assert validation != low_loss
    assert abs(low_loss - loss) < 2.0**-9 * loss
    for found, exact in zip(low_of_both, of_both, strict=True):
        assert relative_error(found, exact) < ROUNDINGS * 2.0**-9


def test_what_they_save_is_not_kept_for_the_backward_pass() -> None:
    stream, inner = ((B, T, C), "float32"), (B, T, 4 * C)
    plain, norm = kept(), kept("fused_layer_norm")
    assert norm[stream] < plain[stream]  # x, but neither x - mean nor what follows
    low = kept("fused_layer_norm", "low_precision_stream")
    assert low[stream] == 0
    assert low[((B, T, C), "bfloat16")] > 0

    def of_gelu(found: Counter[tuple[tuple[int, ...], str]]) -> int:
        return sum(count for (shape, _), count in found.items() if shape in (inner, (B * T, 4 * C)))

    assert of_gelu(kept("fused_gelu")) == 2 < of_gelu(plain)  # its input, and what the next product takes


def test_float32_logits_and_pieces_of_query_key_and_value_are_gone_from_the_lowered_step() -> None:
    logits, whole = (
        "tensor<128x128xf32>",
        "tensor<2x64x6x16xbf16>",
    )  # positions x vocabulary; q, k, v together

    def written(**switches: bool) -> tuple[int, int]:
        text = lowered("gpu", TURING, precision="bf16", **switches)
        products = [line for line, _, _ in signatures(text, "stablehlo.dot_general")]
        return sum(line.endswith(logits) for line in products), text.count(whole)

    assert written()[0] == 1
    assert written()[1] > 0
    assert written(low_precision_logits=True)[0] == 0
    assert written(unfused_qkv=True)[1] == 0
