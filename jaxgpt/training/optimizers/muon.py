"""Muon: momentum whose matrices are made orthogonal by Newton-Schulz iterations.

In bfloat16 and float16 matrices of equal shape are stacked, so that a GPU starts one product for all of them;
on a CPU in float32, too, where what lies between the products costs as much as they do, and over `fsdp`,
where each device gets whole matrices of the stack for its parts of all of them. Else each is iterated by
itself. The state is optax.contrib.muon's, which checkpoints hold.

Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon (and optax.contrib.muon).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.devices.mesh import replicated
from jaxgpt.training.lr_schedule import Schedule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-8
FIRST_MOMENTUM = 0.85  # where momentum rises
FUSED = ".attn.c_attn.kernel"  # (C, 3 C): query, key and value side by side
ROWS, STACKED_ROWS = PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp", None)
ITERATED_IN = {"fp32": None, "bf16": jnp.bfloat16, "fp16": jnp.float16}  # None: the gradients' dtype

Matrices = dict[str, Any]  # by the parameters' names; optax.MaskedNode for what other optimizers train


def matrices(
    config: TrainConfig, learning_rate: Schedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return the transformation of the blocks' matrices' gradients."""
    muon = optax.chain(
        scale_by_muon(config, mesh),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    # optax.contrib.muon has an AdamW beside, which has nothing to do here, but a place in its state.
    adam = optax.adamw(learning_rate)
    return optax.partition(
        {"muon": muon, "adam": adam}, lambda params: jax.tree.map(lambda _: "muon", params)
    )


def scale_by_muon(config: TrainConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Return the transformation of gradients into nearly orthogonal matrices.

    Args:
      config: momentum, momentum_warmup_steps, split_qkv, and the precision of the products.
      mesh: of the training; see orthogonalize_all.
    """
    dtype = ITERATED_IN[config.precision]

    def init(params: Matrices) -> optax.contrib.MuonState:
        momentum = optax.tree.zeros_like(params, dtype=jnp.float32)
        return optax.contrib.MuonState(jnp.zeros([], jnp.int32), momentum, jnp.asarray(COEFFICIENTS))

    def update(
        gradients: Matrices, state: optax.contrib.MuonState, params: Any = None
    ) -> tuple[Matrices, optax.contrib.MuonState]:
        del params
        count = optax.safe_increment(jnp.asarray(state.count))
        beta = _momentum(config, count)
        average = optax.tree.update_moment(gradients, state.mu, beta, 1)
        ahead, latest = average, gradients
        if not config.momentum_warmup_steps:
            ahead = optax.tree.bias_correction(average, beta, optax.safe_increment(count))
            latest = optax.tree.bias_correction(gradients, beta, count)
        # Nesterov's: what the average would be if the next gradient were this one again.
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, latest)
        found = orthogonalize_all(ahead, jnp.asarray(state.ns_coeffs), config.split_qkv, dtype, mesh)
        kept = optax.tree.cast(average, jnp.float32)
        return found, optax.contrib.MuonState(count, kept, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _momentum(config: TrainConfig, count: Array) -> Any:
    """Return the momentum of a step; `count` is 1 at the first."""
    if not config.momentum_warmup_steps:
        return config.momentum
    share = jnp.minimum((count - 1) / config.momentum_warmup_steps, 1.0)
    return FIRST_MOMENTUM + (config.momentum - FIRST_MOMENTUM) * share


def orthogonalize_all(
    gradients: Matrices,
    coefficients: Float[Array, "3"],
    split_qkv: bool,
    dtype: Any,
    mesh: Mesh | None = None,
) -> Matrices:
    """Make every matrix nearly orthogonal.

    Args:
      gradients: matrices (I, O) by their parameters' names.
      coefficients: of the iteration.
      split_qkv: take query, key and value of c_attn apart.
      dtype: of the products' operands, and then equal shapes are stacked; None for the gradients' own.
      mesh: devices that share the work: those of `fsdp`, which hold parts of the gradients, or of a CPU,
        which share its cores. Equal shapes are stacked, and each device takes some matrices of a stack. (Of
        `data` alone GPUs would have to wait for what the others made.)

    Returns:
      Matrices of the same names, shapes and dtypes, with singular values of about 0.7 to 1.2.
    """
    stacked = dtype is not None or mesh is not None
    names = [name for name, leaf in gradients.items() if not isinstance(leaf, optax.MaskedNode)]
    parts: dict[str, list[Array]] = {}
    for name in names:
        split, gradient = split_qkv and name.endswith(FUSED), gradients[name]
        if mesh is not None and _rows_divide(gradient, mesh):
            gradient = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, ROWS))
        parts[name] = jnp.split(gradient, 3, axis=1) if split else [gradient]
    places = [(name, index) for name in names for index in range(len(parts[name]))]
    stacks: dict[Any, list[tuple[str, int]]] = {}
    for place in places:
        stacks.setdefault(parts[place[0]][0].shape if stacked else place, []).append(place)
    for stack in stacks.values():
        whole_stack = jnp.stack([parts[name][i] for name, i in stack])
        found = _on_devices(whole_stack, partial(orthogonalize, coefficients=coefficients, dtype=dtype), mesh)
        for (name, i), matrix in zip(stack, found, strict=True):
            parts[name][i] = matrix
    whole = {
        name: jnp.concatenate(each, axis=1) if len(each) > 1 else each[0] for name, each in parts.items()
    }
    return {**gradients, **whole}


def _on_devices(
    stack: Float[Array, "N I O"],
    change: Callable[[Float[Array, "N I O"]], Float[Array, "N I O"]],
    mesh: Mesh | None,
) -> Float[Array, "N I O"]:
    """Change the matrices of a stack, each device of the mesh its share.

    Written out: the partitioner would split the matrices of the stack, and move their parts and products.
    """
    if mesh is None or mesh.size == 1:
        return change(stack)
    if mesh.shape["fsdp"] > 1:
        return _by_exchange(stack, change, mesh) if _rows_divide(stack, mesh) else change(stack)
    N = stack.shape[0]
    share = -(-N // mesh.size)
    even = jnp.pad(stack, ((0, share * mesh.size - N), (0, 0), (0, 0)))

    def own(whole: Float[Array, "N2 I O"]) -> Float[Array, "N3 I O"]:
        return change(jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("data") * share, share))

    found = jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("data"))(even)
    return jax.lax.with_sharding_constraint(found, replicated(mesh))[:N]


def _rows_divide(matrices: Array, mesh: Mesh) -> bool:
    """Whether each device of `fsdp` can hold as many rows of a matrix, or of each of a stack."""
    return mesh.shape["fsdp"] > 1 and matrices.shape[-2] % mesh.shape["fsdp"] == 0


def _by_exchange(
    stack: Float[Array, "N I O"],
    change: Callable[[Float[Array, "N3 I O"]], Float[Array, "N3 I O"]],
    mesh: Mesh,
) -> Float[Array, "N I O"]:
    """Change the matrices of a stack of which each device of `fsdp` holds some rows.

    The devices exchange rows of all matrices for some whole ones, and back. Those of `data` do the same work.
    """
    N, parts = stack.shape[0], mesh.shape["fsdp"]
    even = jnp.pad(stack, ((0, -N % parts), (0, 0), (0, 0)))

    def own(rows: Float[Array, "N2 I2 O"]) -> Float[Array, "N2 I2 O"]:
        whole = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_to_all(change(whole), "fsdp", split_axis=1, concat_axis=0, tiled=True)

    return jax.shard_map(own, mesh=mesh, in_specs=STACKED_ROWS, out_specs=STACKED_ROWS)(even)[:N]


def orthogonalize(
    x: Float[Array, "*N I O"], coefficients: Float[Array, "3"], dtype: Any = None
) -> Float[Array, "*N I O"]:
    """Move every singular value of a matrix, or of each of a stack, to about 1 (0.7 to 1.2).

    X <- a X + (b A + c A A) X with A = X X^T, five times, from X divided by its Frobenius norm.

    Args:
      x: matrices.
      coefficients: a, b, c.
      dtype: of the products' operands; x's if None. Sums are float32.
    """
    given, wide = x.dtype, x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, ord="fro", axis=(-2, -1), keepdims=True) + EPSILON)
    a, b, c = coefficients.astype(given)
    for _ in range(ITERATIONS):
        square = _product(x, x.mT, dtype)
        polynomial = b * square + _product(c * square, square, dtype)
        x = a * x + _product(polynomial, x, dtype)
    return x if wide else x.mT


def _product(x: Float[Array, "*N I K"], y: Float[Array, "*N K O"], dtype: Any) -> Float[Array, "*N I O"]:
    """Multiply operands of a dtype, sum in x's; a GPU sums float16 in float32, XLA's CPU backend does not."""
    if dtype is None:
        return x @ y
    sums = x.dtype if dtype == jnp.bfloat16 else None
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=sums).astype(x.dtype)


def _scale_by_shape(updates: Any, params: Any) -> Any:
    """Scale by sqrt(max(1, O / I)), so that inputs of norm 1 change outputs alike whatever the shape."""
    del params
    return jax.tree.map(lambda u: jnp.sqrt(jnp.maximum(1, u.shape[1] / u.shape[0])) * u, updates)
