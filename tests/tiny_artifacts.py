"""Artifacts of every kind with random weights and a certificate, written by the product's own functions."""

import dataclasses
from pathlib import Path

import torch
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.certificate import write_certificate
from jaxgpt_export.format.probe import Probe, probe_positions, write_probe
from jaxgpt_export.format.scheme import Quantization, has_factors
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.model.build import Tensors, as_array, as_arrays, build_model, float_model
from jaxgpt_export.parity.probe_gates import measure
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.gptq import round_groups
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.quantizer import two_level_layers
from jaxgpt_export.quantize.state_dict import quantized_state_dict

from jaxgpt.shared.architecture import HEAD, linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.tensor_file import Arrays, write_tensor_file

KINDS = (
    "fp32",
    "int8-dynamic",
    "int8-static",
    "int8-weight-only",
    "int4-weight-only",
    "int4-weight-only-head",
    "fp16",
    "int4-dynamic",
    "int4-dynamic-head",
)
SHAPE = ModelConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=24)


def tiny_artifacts(scratch: Path) -> dict[str, Path]:
    """Write one artifact a kind: learned and rotary positions, tied and untied heads, both among them."""
    rotary = dataclasses.replace(SHAPE, n_layer=1, positions="rotary", tied=False)
    configs = dict.fromkeys(KINDS, SHAPE) | {"int8-static": rotary, "int4-weight-only": rotary}
    return {kind: _write(scratch / kind, kind, config) for kind, config in configs.items()}


def tiny_artifact(scratch: Path, config: ModelConfig = SHAPE) -> Path:
    """Write the float32 one alone, which takes less time."""
    return _write(scratch / "fp32", "fp32", config)


def _write(folder: Path, kind: str, config: ModelConfig) -> Path:
    folder.mkdir()
    tensors = random_tensors(config)
    probe = _probe(config, tensors)
    quantization, content = _float(config, tensors) if kind == "fp32" else _quantized(kind, config, tensors)
    write_artifact(folder, config, quantization, content, placeholder_tokenizer(config.vocab_size))
    write_probe(folder, probe)
    if kind == "fp32":
        scales = {f"{name}.input_scale": as_array(torch.tensor(0.05)) for name in linear_layers(config)}
        write_tensor_file(folder / "qat.safetensors", {**scales, "logits": probe.logits})
    artifact = read_artifact(folder)
    parity = dataclasses.asdict(measure(build_model(artifact), probe))
    write_certificate(folder, artifact.kind, {"step": None, "source": "random"}, {"parity": parity})
    return folder


def _probe(config: ModelConfig, tensors: Tensors) -> Probe:
    tokens = torch.arange(2 * config.block_size, dtype=torch.int32).reshape(2, -1)
    logits = float_model(config, tensors)(tokens.long()).flatten(0, 1)
    positions = probe_positions(tokens.numel(), config)
    return Probe(tokens.numpy(), positions, logits[positions].detach().numpy())


def _float(config: ModelConfig, tensors: Tensors) -> tuple[None, Arrays]:
    return None, to_hf_layout(as_arrays(tensors), config)


def _quantized(kind: str, config: ModelConfig, tensors: Tensors) -> tuple[Quantization, Arrays]:
    method = find_method(kind)
    schemes, names = method.schemes(config), linear_layers(config)
    activations, two_level = {}, []
    if schemes[HEAD].activation != "float":
        scale = torch.tensor(0.05) if schemes[HEAD].activation == "static" else None
        activations = {name: ActivationQuant(scale, None, 0.0) for name in names}
        two_level = two_level_layers(config)[:3]
    if kind == "int8-dynamic":
        smooth = {"h.0.mlp.c_proj": 4 * config.n_embd, HEAD: config.n_embd}
        activations |= {
            n: ActivationQuant(None, torch.linspace(0.5, 2, size), 0.0) for n, size in smooth.items()
        }
    groups = {
        name: round_groups(tensors[f"{name}.weight"], scheme.group_size, has_factors(name, schemes, config))
        for name, scheme in schemes.items()
        if scheme.weight_bits == 4 and f"{name}.weight" in tensors
    }
    found = quantized_state_dict(
        config, tensors, method.name, schemes, activations, groups, two_level=two_level
    )
    return found.quantization, as_arrays(found.tensors)
