"""The whole training step, lowered for a GPU or TPU that is not there: which numbers its products take."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import pytest

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.model.numerics import TRAFFIC, Numerics, choose_numerics
from jaxgpt.training.step.compiled import DETERMINISTIC_OPTIONS, CompiledTraining

MODEL = {"vocab_size": 128, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 32}
HOPPER, TURING = 9.0, 7.5  # compute capabilities: with cuDNN's attention, and without
PRODUCTS = ("stablehlo.dot_general", "stablehlo.convolution")


@functools.cache
def lowered(platform: str, capability: float = 0.0, qat: bool = False, **settings: object) -> str:
    """Return a training step's StableHLO."""
    model, train = ModelConfig(**MODEL, qat=qat), TrainConfig(batch_size=2, **settings)
    numerics, _ = choose_numerics(model, train, platform, capability)
    compiled = CompiledTraining(model, train, make_mesh("", 1), numerics)
    return compiled.lower_step(("cuda",) if platform == "gpu" else (platform,)).as_text()


def signatures(text: str, *operations: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the line of each operation, and the dtypes of its operands and results."""
    for line in text.splitlines():
        if any(operation in line for operation in operations):
            _, _, types = line.rpartition(" : ")
            operands, results = (re.findall(r"tensor<(?:\d+x)*(\w+)>", part) for part in types.split("->"))
            yield line.strip(), operands, results


def float32_products(text: str) -> list[str]:
    found = list(signatures(text, *PRODUCTS))
    assert len(found) >= 3 * 4  # linear layers, forward and backward
    return [line for line, operands, _ in found if "f32" in operands]


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("capability", [HOPPER, TURING])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_product_of_a_step_takes_the_compute_dtype_in_both_directions(
    pretend_a_gpu: None, precision: str, capability: float, qat: bool
) -> None:
    text = lowered("gpu", capability, qat=qat, precision=precision)
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == (capability == HOPPER)
    assert float32_products(text) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_product_of_muon_takes_the_compute_dtype(precision: str) -> None:
    text = lowered("gpu", TURING, precision=precision, optimizer="muon", learning_rate=0.02)
    assert float32_products(text) == []


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_sum_of_a_step_is_narrower_than_float32(precision: str, qat: bool) -> None:
    """Sums over tokens above all: in bfloat16 one of 256 equal numbers would stand still."""
    text = lowered("gpu", TURING, qat=qat, precision=precision)
    sums = list(signatures(text, "applies stablehlo.add across"))
    assert len(sums) > 10
    assert [line for line, _, results in sums if not set(results) <= {"f32", "i32"}] == []


def test_float32_has_products_of_float32_only() -> None:
    text = lowered("gpu", HOPPER, precision="fp32")
    assert len(float32_products(text)) == len(list(signatures(text, *PRODUCTS)))


def test_the_step_lowers_for_a_tpu() -> None:
    text = lowered("tpu", precision="bf16", optimizer="muon", **dict.fromkeys(TRAFFIC, True))
    assert any(operands == ["bf16", "bf16"] for _, operands, _ in signatures(text, *PRODUCTS))


def test_a_deterministic_training_says_so_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.jit(lambda x: x).lower(1.0).compile(DETERMINISTIC_OPTIONS["gpu"])  # XLA knows it
    monkeypatch.setitem(DETERMINISTIC_OPTIONS, "cpu", {"xla_no_such_option": True})
    model, train, mesh = ModelConfig(**MODEL), TrainConfig(batch_size=2), make_mesh("", 1)
    assert CompiledTraining(model, train, mesh, Numerics()).compiler_options == {}
    train = dataclasses.replace(train, deterministic=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        CompiledTraining(model, train, mesh, Numerics()).compile_step()
