"""The step for CUDA, without a GPU: flash attention and float16 products, read from its lowering."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.devices.mesh import batch_sharding, make_mesh
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.model.params import graph_of, init_params
from jaxgpt.training.step.compiled import CompiledTraining
from jaxgpt.training.step.optimizer import make_optimizer
from jaxgpt.training.step.state import first_state
from jaxgpt.training.step.train_step import make_eval_step, make_train_step

MODEL = ModelConfig(vocab_size=128, block_size=64, n_layer=2, n_head=2, n_embd=128)


def lowered(capability: float, model: ModelConfig = MODEL, **train: Any) -> str:
    settings = TrainConfig(batch_size=4, **train)
    numerics, _ = choose_numerics(model, settings, "gpu", capability)
    optimizer = make_optimizer(settings, model)
    state = jax.eval_shape(lambda: first_state(init_params(model, 0), optimizer, 0, settings))
    tokens = jax.ShapeDtypeStruct((1, 4, 64), jnp.int32)
    step = make_train_step(graph_of(model, numerics), optimizer, make_mesh("", 1), settings, dropout=False)
    return jax.jit(step).trace(state, tokens, tokens).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_step_for_cuda_calls_the_fused_kernel_forward_and_backward(
    pretend_a_gpu: None, precision: str, remat: bool
) -> None:
    text = lowered(9.0, precision=precision, remat=remat)
    backward = text.count("__cudnn$fmhaSoftmaxBackward")
    forward = text.count("__cudnn$fmhaSoftmax") - backward
    assert backward >= 1
    assert forward >= 1
    assert "64x64xf32" not in text  # the weights of attention are never written


@pytest.mark.parametrize(("mesh", "devices"), [("data=2", 2), ("fsdp=2", 2), ("data=2,fsdp=2", 4)])
def test_the_step_of_several_gpus_calls_the_fused_kernel_with_no_partitioner_between(
    pretend_a_gpu: None, mesh: str, devices: int
) -> None:
    """Were an axis left to it, even one of a single device, XLA would ask it, and end with its error."""
    settings = TrainConfig(batch_size=4, precision="bf16")
    numerics, _ = choose_numerics(MODEL, settings, "gpu", 9.0)
    compiled = CompiledTraining(MODEL, settings, make_mesh(mesh, devices), numerics)
    text = compiled.lower_step(("cuda",)).as_text()
    tokens = jax.ShapeDtypeStruct(
        (4, 64), jnp.int32, sharding=batch_sharding(make_mesh(mesh, devices), axis=0, ndim=2)
    )
    validation = jax.jit(make_eval_step(compiled.graph, 2, make_mesh(mesh, devices), flash=True)).trace(
        compiled.sharded_shapes().params, tokens, tokens
    )
    evaluated = validation.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in evaluated
    assert "CustomSPMDPartitioning" not in text + evaluated
    backward = text.count("__cudnn$fmhaSoftmaxBackward")
    assert backward >= 1
    assert text.count("__cudnn$fmhaSoftmax") > backward


def test_an_older_gpu_gets_xla_s_attention(pretend_a_gpu: None) -> None:
    assert "cudnn" not in lowered(7.5, precision="fp16")


@pytest.mark.parametrize("qat", [False, True])
def test_a_step_lowered_for_cuda_has_its_float16_products_with_float32_sums(qat: bool) -> None:
    """Though it is lowered on a CPU, whose XLA has none of these."""
    text = lowered(7.5, dataclasses.replace(MODEL, qat=qat), precision="fp16")
    kind = r"tensor<[\dx]*x(\w+)>"
    products = re.findall(rf"dot_general.*: \({kind}, {kind}\) -> {kind}", text)
    assert ("f16", "f16", "f32") in products
    cpu, _ = choose_numerics(MODEL, TrainConfig(precision="fp16"), "cpu", 0.0)
    gpu, _ = choose_numerics(MODEL, TrainConfig(precision="fp16"), "gpu", 7.5)
    assert (cpu.wide_sums, gpu.wide_sums) == (False, True)


@pytest.mark.parametrize(
    ("changes", "precision", "platform", "capability", "why"),
    [
        ({}, "bf16", "gpu", 8.0, "flash attention by cuDNN"),
        ({}, "bf16", "cpu", 0.0, "no GPU"),
        ({}, "fp16", "gpu", 7.5, "compute capability 7.5"),
        ({}, "fp32", "gpu", 9.0, "precision is fp32"),
        ({"n_head": 32}, "bf16", "gpu", 9.0, "head size 4"),
        ({"n_embd": 320, "n_head": 2}, "bf16", "gpu", 9.0, "head size 160"),
        ({"block_size": 65}, "bf16", "gpu", 9.0, "block_size 65 is odd"),
        ({"dropout": 0.1}, "bf16", "gpu", 9.0, "dropout"),
        ({"attn_dropout": 0.1}, "bf16", "gpu", 9.0, "dropout"),
        ({"dropout": 0.1, "attn_dropout": 0.0}, "bf16", "gpu", 9.0, "flash attention by cuDNN"),
    ],
)
def test_the_reason_is_told(
    changes: dict[str, Any], precision: Any, platform: str, capability: float, why: str
) -> None:
    train = TrainConfig(precision=precision)
    numerics, reason = choose_numerics(dataclasses.replace(MODEL, **changes), train, platform, capability)
    assert why in reason
    assert numerics.flash == (why == "flash attention by cuDNN")
