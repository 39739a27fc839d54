"""What the devices say to each other in a step, and what lives in memory, read from the compiled program."""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.shared.config import ModelConfig, Precision, TrainConfig
from jaxgpt.training.devices.mesh import batch_sharding, make_mesh
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.numerics import TRAFFIC, Numerics, choose_numerics
from jaxgpt.training.model.params import abstract_params, graph_of, init_params
from jaxgpt.training.step.compiled import CompiledTraining
from jaxgpt.training.step.train_step import make_eval_step

MODEL = ModelConfig(vocab_size=80, block_size=24, n_layer=2, n_head=2, n_embd=32)
# As wide as GPT-2, with a padded table: the partitioner left to itself moves activations here.
WIDE = ModelConfig(vocab_size=50_304, block_size=1024, n_layer=1, n_head=12, n_embd=768)
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
Shape = tuple[int, ...]


def communication(
    mesh_text: str, grad_accum_steps: int, model: ModelConfig = MODEL, on_cpu: bool = False, **settings: Any
) -> list[tuple[str, Shape]]:
    """Every (collective, result shape) of a compiled step over 8 devices."""
    train = TrainConfig(batch_size=16 * grad_accum_steps, grad_accum_steps=grad_accum_steps, **settings)
    numerics = Numerics(on_cpu=on_cpu)
    return collectives(CompiledTraining(model, train, make_mesh(mesh_text, 8), numerics).compile_step())


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str, Shape]]:
    """Every (collective, result shape) of a compiled program."""
    text = compiled.as_text()
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes]
    return found


def named_shapes(model: ModelConfig) -> dict[str, Shape]:
    return {name: leaf.shape for name, leaf in abstract_params(model).items()}


def shapes_of(model: ModelConfig) -> list[Shape]:
    return list(named_shapes(model).values())


@pytest.mark.parametrize("mesh_text", ["data=8", "fsdp=8", "data=2,fsdp=4"])
def test_a_validation_step_gathers_parameters_and_never_activations(mesh_text: str) -> None:
    """With the head in chunks: a scan over positions that devices share would bring all of them to each."""
    mesh = make_mesh(mesh_text, 8)
    compiled = CompiledTraining(MODEL, TrainConfig(batch_size=16), mesh, Numerics())
    tokens = jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=batch_sharding(mesh, axis=0, ndim=2))
    step = jax.jit(make_eval_step(graph_of(MODEL), 4, mesh))
    program = step.lower(compiled.sharded_shapes().params, tokens, tokens).compile()
    found = collectives(program)
    params, batch = init_params(MODEL, 0), np.arange(16 * 24, dtype=np.int32).reshape(16, 24) % 80
    targets = np.where(batch % 7 == 0, -1, batch[:, ::-1])
    placed = jax.device_put((params, batch, targets), (compiled.shardings.params, *[tokens.sharding] * 2))
    loss, count = program(*placed)
    expected, counted = make_eval_step(graph_of(MODEL))(params, jnp.asarray(batch), jnp.asarray(targets))
    assert int(count) == int(counted) == (targets >= 0).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)  # float32 sums in another order
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    assert set(gathered) <= set(shapes_of(MODEL))
    assert (mesh_text == "data=8") == (gathered == [])
    reduced = [shape for kind, shape in found if kind != "all-gather"]
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce"}
    assert 0 < len(reduced) <= 4
    assert set(reduced) == {()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_accum_steps", [1, 4])
def test_data_parallel_step_reduces_one_gradient_whatever_the_accumulation(
    grad_accum_steps: int, optimizer: str
) -> None:
    found = communication("data=8", grad_accum_steps, optimizer=optimizer)
    assert {kind for kind, _ in found} == {"all-reduce"}
    values = sum(math.prod(shape) for _, shape in found)
    gradient = sum(math.prod(shape) for shape in shapes_of(MODEL))
    assert gradient < values <= gradient + 4  # besides: loss and number of targets


def test_devices_of_a_cpu_gather_the_matrices_that_each_made_orthogonal_and_nothing_else() -> None:
    found = communication("data=8", 1, on_cpu=True, optimizer="muon", split_qkv=True)
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    # Two blocks have eight matrices of 32 x 32, and two of each kind of the MLP's, padded to one a device;
    # tall ones are made orthogonal, and may travel, transposed.
    assert sorted(tuple(sorted(shape)) for shape in gathered) == [(8, 32, 32), (8, 32, 128), (8, 32, 128)]
    reduced = sum(math.prod(shape) for kind, shape in found if kind == "all-reduce")
    assert reduced <= sum(map(math.prod, shapes_of(MODEL))) + 4
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("mesh", "parts", "grad_accum_steps", "model"),
    [
        ("fsdp=8", 8, 1, MODEL),
        ("fsdp=8", 8, 4, MODEL),
        ("data=2,fsdp=4", 4, 1, MODEL),
        ("data=4,fsdp=2", 2, 4, MODEL),
        ("data=2,fsdp=4", 4, 2, WIDE),
    ],
)
def test_fsdp_gathers_parameters_and_never_activations(
    mesh: str, parts: int, grad_accum_steps: int, model: ModelConfig, optimizer: str
) -> None:
    found = communication(mesh, grad_accum_steps, model, optimizer=optimizer, split_qkv=optimizer == "muon")
    exchanged = [shape for kind, shape in found if kind == "all-to-all"]
    found = [each for each in found if each[0] != "all-to-all"]
    # Muon exchanges rows of matrices for whole ones: no device sends more than a part of each, four times
    # (to rows, to matrices, and both back); stacks are padded to one matrix a device.
    blocks = sum(math.prod(shape) for name, shape in named_shapes(model).items() if ".kernel" in name)
    padded = blocks / model.n_layer * max(model.n_layer, parts)
    assert (sum(map(math.prod, exchanged)) > 0) == (optimizer == "muon")
    assert sum(map(math.prod, exchanged)) <= 4 * padded / parts
    parameters = shapes_of(model)
    shards = {
        tuple(n // parts if i == axis else n for i, n in enumerate(shape))
        for shape in parameters
        for axis in range(len(shape))
    }
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathers = [shape for kind, shape in found if kind == "all-gather"]
    # Forward and backward pass gather each parameter at most once each.
    assert set(gathers) <= set(parameters)
    assert 0 < len(gathers) <= 2 * len(parameters)
    scattered = [shape for kind, shape in found if kind == "reduce-scatter"]
    assert set(scattered) <= shards
    assert 0 < len(scattered) <= len(parameters)
    # Reduced are gradients (of shards over data, of what is not split over both) and scalars.
    assert {shape for kind, shape in found if kind == "all-reduce"} <= {*parameters, *shards, ()}


@pytest.mark.parametrize(
    ("precision", "grad_accum_steps", "qat", "switches"),
    [(*each, ()) for each in itertools.product(("fp32", "bf16"), (1, 2), (False, True))]
    + [("bf16", 1, False, TRAFFIC)],
)
def test_fsdp_gathers_matrices_again_for_the_backward_pass(
    grad_accum_steps: int, precision: Precision, qat: bool, switches: tuple[str, ...]
) -> None:
    """Read before XLA optimizes: once for the forward pass, once more for the gradient of its input.

    The embeddings are not needed again: the head's gradient is formed in the forward pass.
    """
    train = TrainConfig(
        batch_size=16 * grad_accum_steps,
        grad_accum_steps=grad_accum_steps,
        precision=precision,
        **dict.fromkeys(switches, True),
    )
    model = dataclasses.replace(MODEL, qat=qat)
    numerics, _ = choose_numerics(model, train, "cpu", 0.0)
    text = CompiledTraining(model, train, make_mesh("fsdp=8", 8), numerics).lower_step().as_text()
    found = re.findall(r"stablehlo.all_gather.*?-> tensor<([\dx]+)xf32>", text, re.DOTALL)
    gathered = Counter(tuple(map(int, shape.split("x"))) for shape in found)
    parameters = Counter(shapes_of(MODEL))
    kernels = {shape for name, shape in named_shapes(MODEL).items() if name.endswith("kernel")}
    matrices = {shape: count for shape, count in gathered.items() if len(shape) == 2}
    assert matrices == {
        shape: count * (2 if shape in kernels else 1)
        for shape, count in parameters.items()
        if len(shape) == 2
    }


def test_chunked_cross_entropy_halves_the_peak_at_gpt2_s_vocabulary() -> None:
    model = ModelConfig(vocab_size=50_257, block_size=256, n_layer=1, n_head=2, n_embd=64)
    params = jax.eval_shape(lambda: init_params(model, 0))
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def temporary_bytes(chunks: int) -> int:
        def gradient(params: object, inputs: jax.Array, targets: jax.Array) -> object:
            return jax.grad(lambda p: summed_loss(graph_of(model), p, inputs, targets, chunks=chunks)[0])(
                params
            )

        compiled = jax.jit(gradient).lower(params, tokens, tokens).compile()
        analysis = compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)

    assert temporary_bytes(8) <= temporary_bytes(1) / 2


@functools.cache
def gradient(**how: Any) -> dict[str, jax.Array]:
    """The gradient of a small batch in float64."""
    params = init_params(MODEL, 0, jnp.float64)
    tokens = jax.random.randint(jax.random.key(0), (3, 25), 0, 80)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].at[1, 7:].set(-1)
    graph = graph_of(MODEL, Numerics(jnp.float64, jnp.float64))
    return jax.jit(jax.grad(lambda p: summed_loss(graph, p, inputs, targets, **how)[0]))(params)


@pytest.mark.parametrize("chunks", [2, pytest.param(8, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("remat", [False, True])
def test_chunks_and_remat_change_memory_not_the_gradient(chunks: int, remat: bool) -> None:
    with jax.enable_x64(True):
        plain, other = gradient(), gradient(chunks=chunks, remat=remat)
        assert max(float(jnp.abs(plain[k] - other[k]).max()) for k in plain) <= 1e-10
