"""Muon against optax.contrib.muon (to the bit, in float32) and against its formula in float64."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest

from jaxgpt.shared.config import Precision, TrainConfig
from jaxgpt.training.devices.mesh import make_mesh, replicated, state_shardings
from jaxgpt.training.optimizers.muon import COEFFICIENTS, matrices, orthogonalize_all, scale_by_muon

CONFIG = TrainConfig(optimizer="muon", momentum=0.9, weight_decay=0.3)
SHAPES = {
    "h.0.attn.c_attn.kernel": (8, 24),
    "h.0.attn.c_proj.kernel": (8, 8),
    "h.1.attn.c_proj.kernel": (8, 8),
    "h.0.mlp.c_proj.kernel": (32, 8),
}
COEFFICIENTS_64 = np.array(COEFFICIENTS)
# bfloat16 keeps 8 bits; five iterations multiply an error of 2^-8 by at most a few.
BF16_TOLERANCE = 0.06
FLOAT32_TOLERANCE = 1e-4

Arrays = dict[str, npt.NDArray[np.float64]]


def random_matrices(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in SHAPES.items()}


def in_float32(arrays: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def orthogonal(arrays: dict[str, jax.Array], split_qkv: bool, dtype: Any) -> dict[str, jax.Array]:
    return orthogonalize_all(arrays, jnp.asarray(COEFFICIENTS), split_qkv, dtype)


def by_formula(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Newton-Schulz in float64, one matrix, never transposed."""
    a, b, c = COEFFICIENTS_64
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_float32_has_the_state_and_the_bits_of_optax() -> None:
    rate = optax.linear_schedule(0.1, 0.0, 20)
    theirs = optax.contrib.muon(rate, beta=0.9, weight_decay=0.3, mu_dtype=jnp.float32)
    params = {**in_float32(random_matrices(0)), "wte.embedding": optax.MaskedNode()}
    states, kept = [], []
    for optimizer in (matrices(CONFIG, rate), theirs):
        state, found = optimizer.init(params), params
        update = jax.jit(optimizer.update)
        for step in range(3):
            gradients = {**in_float32(random_matrices(step + 1)), "wte.embedding": optax.MaskedNode()}
            change, state = update(gradients, state, found)
            found = optax.apply_updates(found, change)
        states.append(jax.tree_util.tree_flatten_with_path((state, found)))
        kept.append(found)
    (ours, our_tree), (other, other_tree) = states
    assert our_tree == other_tree  # so a checkpoint of either restores into the other
    for (path, mine), (_, value) in zip(ours, other, strict=True):
        assert np.array_equal(mine, value), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("split_qkv", "dtype"), [(False, None), (True, jnp.bfloat16), (True, jnp.float16)])
def test_matrices_alone_or_stacked_follow_the_formula(split_qkv: bool, dtype: Any) -> None:
    given = random_matrices(3)
    found = orthogonal(in_float32(given), split_qkv, dtype)
    tolerance = FLOAT32_TOLERANCE if dtype is None else BF16_TOLERANCE
    assert set(found) == set(SHAPES)
    for name, matrix in given.items():
        parts = np.split(matrix, 3, axis=1) if split_qkv and "c_attn" in name else [matrix]
        expected = np.concatenate([by_formula(part) for part in parts], axis=1)
        assert found[name].dtype == jnp.float32
        assert np.abs(np.asarray(found[name]) - expected).max() < tolerance, name


def test_a_step_of_the_thirds_is_scaled_by_the_shape_of_the_whole_matrix() -> None:
    """sqrt(O / I), here sqrt(3), of query, key and value side by side; no matrix is scaled down."""
    config, given = dataclasses.replace(CONFIG, split_qkv=True, weight_decay=0.0), random_matrices(6)
    optimizer, params = matrices(config, optax.constant_schedule(1.0)), in_float32(random_matrices(0))
    found, _ = optimizer.update(in_float32(given), optimizer.init(params), params)
    for name, gradient in given.items():
        fused = "c_attn" in name
        parts = np.split(gradient, 3, axis=1) if fused else [gradient]
        expected = -np.sqrt(3 if fused else 1) * np.concatenate([by_formula(part) for part in parts], axis=1)
        # FLOAT32_TOLERANCE is that of values of about 1, these are up to sqrt(3) times as large.
        assert np.abs(np.asarray(found[name]) - expected).max() < FLOAT32_TOLERANCE * np.sqrt(3), name


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_of_a_cpu_take_a_share_each_and_find_the_same_bits(devices: int) -> None:
    given, mesh = in_float32(random_matrices(4)), make_mesh("", devices)
    coefficients = jnp.asarray(COEFFICIENTS)

    def shared(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return orthogonalize_all(arrays, coefficients, True, None, mesh)

    compiled = jax.jit(shared).lower(jax.device_put(given, replicated(mesh))).compile()
    share = -(-5 // devices)  # of query, key, value and two projections
    products = re.findall(r"f32\[(\d+),8,8\]\S* dot\(", compiled.as_text())
    assert set(products) == {str(share)}
    found, alone = compiled(jax.device_put(given, replicated(mesh))), orthogonal(given, True, None)
    for name in SHAPES:
        assert np.array_equal(found[name], alone[name]), name


@pytest.mark.parametrize(("mesh_text", "dtype"), [("fsdp=4", None), ("data=2,fsdp=2", jnp.bfloat16)])
def test_devices_that_hold_parts_of_matrices_exchange_them_for_whole_ones(mesh_text: str, dtype: Any) -> None:
    """Each iterates its share, and gets the values of one device that iterates all."""
    mesh = make_mesh(mesh_text, 4)
    given, coefficients = in_float32(random_matrices(4)), jnp.asarray(COEFFICIENTS)

    def compiled_for(arrays: dict[str, jax.Array]) -> jax.stages.Compiled:
        lies = state_shardings(mesh, arrays)
        shared = jax.jit(
            lambda arrays: orthogonalize_all(arrays, coefficients, True, dtype, mesh), out_shardings=lies
        )
        return shared.lower(jax.device_put(arrays, lies)).compile()

    text = compiled_for(given).as_text()
    share = -(-5 // mesh.shape["fsdp"])  # of query, key, value and two projections
    assert set(re.findall(r"= \S+\[(\d+),8,8\]\S* dot\(", text)) == {str(share)}
    assert "all-to-all" in text
    assert not re.search("all-reduce|all-gather", text)
    given["odd"] = jnp.ones((9, 8)).at[0, 0].set(5.0)  # its rows can't be shared
    found = compiled_for(given)(jax.device_put(given, state_shardings(mesh, given)))
    alone = orthogonal(given, True, dtype)
    # The same products; XLA may sum the norm of a stack of another size in another order.
    tolerance = 1e-5 if dtype is None else BF16_TOLERANCE
    for name in given:
        assert np.abs(np.asarray(found[name]) - alone[name]).max() < tolerance, name


def test_query_key_and_value_become_orthogonal_apart() -> None:
    gradient = random_matrices(5)["h.0.attn.c_attn.kernel"]
    gradient[:, :8] *= 100.0  # a query that outweighs key and value in a matrix of all three
    whole = {"h.0.attn.c_attn.kernel": jnp.asarray(gradient, jnp.float32)}

    def smallest(split_qkv: bool) -> float:
        found = orthogonal(whole, split_qkv, None)["h.0.attn.c_attn.kernel"]
        return min(np.linalg.svd(part, compute_uv=False).min() for part in np.split(found, 3, axis=1))

    assert smallest(True) > 0.3
    assert smallest(False) < 0.2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_take_operands_of_the_precision_and_are_stacked(precision: Precision) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, split_qkv=True)
    optimizer, params = matrices(config, optax.constant_schedule(0.1)), in_float32(random_matrices(0))
    text = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
    operands = re.findall(r"dot_general .*: \((tensor<\S+>), (tensor<\S+>)\)", text)
    short = {"bf16": "xbf16>", "fp16": "xf16>"}[precision]
    assert all(each.endswith(short) for pair in operands for each in pair)
    # Five square matrices (query, key, value and two projections) and one of the MLP, 5 times 3 products.
    assert len(operands) == 2 * 15
    assert sum("<5x8x8x" in left for left, _ in operands) == 15


def test_momentum_rises_from_085_and_then_stays() -> None:
    """Orthogonalized is beta m + (1 - beta) g, m the average with the step's beta; compared in float64."""
    config = dataclasses.replace(CONFIG, momentum=0.95, momentum_warmup_steps=2)
    name = "h.0.attn.c_proj.kernel"
    optimizer = scale_by_muon(config)
    state, average = optimizer.init({name: jnp.zeros((8, 8))}), np.zeros((8, 8))
    for step, beta in enumerate((0.85, 0.90, 0.95, 0.95)):
        gradient = random_matrices(step)[name]
        found, state = optimizer.update({name: jnp.asarray(gradient, jnp.float32)}, state)
        average = beta * average + (1 - beta) * gradient
        expected = by_formula(beta * average + (1 - beta) * gradient)
        assert np.abs(np.asarray(found[name]) - expected).max() < FLOAT32_TOLERANCE


def test_a_configuration_from_before_these_settings_means_what_it_did() -> None:
    old = dataclasses.asdict(CONFIG)
    for name in ("split_qkv", "momentum_warmup_steps"):
        del old[name]
    assert TrainConfig.from_json(old, "config.json") == CONFIG
