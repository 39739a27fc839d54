"""Artifacts of every kind with random weights and a certificate, written by the product's own functions."""

import dataclasses
from pathlib import Path

import torch
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import Tensors, read_artifact, to_hf_name, write_artifact
from jaxgpt_export.format.certificate import write_certificate
from jaxgpt_export.format.probe import Probe, probe_positions, write_probe
from jaxgpt_export.format.scheme import FOUR_BIT_METHODS, HEAD, Quantization, linear_layers, usual_bits
from jaxgpt_export.model.gpt import EMBEDDINGS, float_model
from jaxgpt_export.parity.probe_gates import measure
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.gptq import round_groups
from jaxgpt_export.quantize.quantizer import two_level_layers
from jaxgpt_export.quantize.state_dict import quantized_state_dict
from safetensors.torch import save_file

from jaxgpt.shared.config import ModelConfig

KINDS = ("fp32", "dynamic", "static", "weight-only-int8", "weight-only-int4", "weight-only-int4-head")
SHAPE = ModelConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=24)
GROUP_SIZE = 8


def tiny_artifacts(scratch: Path) -> dict[str, Path]:
    """Write one artifact a kind: learned and rotary positions, tied and untied heads, both among them."""
    rotary = dataclasses.replace(SHAPE, n_layer=1, positions="rotary", tied=False)
    configs = dict.fromkeys(KINDS, SHAPE) | {"static": rotary, "weight-only-int4": rotary}
    return {kind: _write(scratch / kind, kind, config) for kind, config in configs.items()}


def _write(folder: Path, kind: str, config: ModelConfig) -> Path:
    folder.mkdir()
    tensors = random_tensors(config)
    probe = _probe(config, tensors)
    quantization, content = _float(tensors) if kind == "fp32" else _quantized(kind, config, tensors)
    write_artifact(folder, config, quantization, content, placeholder_tokenizer(config.vocab_size))
    write_probe(folder, probe)
    if kind == "fp32":
        steps = {f"{name}.input_scale": torch.tensor(0.05) for name in linear_layers(config)}
        save_file({**steps, "logits": probe.logits}, folder / "qat.safetensors")
    artifact = read_artifact(folder)
    parity = dataclasses.asdict(measure(artifact.model(), probe))
    write_certificate(folder, artifact.kind, {"step": None, "source": "random"}, {"parity": parity})
    return folder


def _probe(config: ModelConfig, tensors: Tensors) -> Probe:
    tokens = torch.arange(2 * config.block_size, dtype=torch.int32).reshape(2, -1)
    logits = float_model(config, tensors)(tokens.long()).flatten(0, 1)
    positions = probe_positions(tokens.numel(), config.vocab_size)
    return Probe(tokens, positions, logits[positions].detach())


def _float(tensors: Tensors) -> tuple[None, Tensors]:
    content = {}
    for name, tensor in tensors.items():
        conv1d = tensor.ndim == 2 and not name.startswith((*EMBEDDINGS, HEAD))
        content[to_hf_name(name)] = tensor.t() if conv1d else tensor
    return None, content


def _quantized(kind: str, config: ModelConfig, tensors: Tensors) -> tuple[Quantization, Tensors]:
    bits = usual_bits(config, kind)
    plans, groups, size = {}, {}, 0
    if kind in ("dynamic", "static"):
        names = linear_layers(config)
        steps = {name: torch.tensor(0.05) if kind == "static" else None for name in names}
        plans = {name: ActivationQuant(step, None, 0.0) for name, step in steps.items()}
    if kind == "dynamic":
        smooth = {"h.0.mlp.c_proj": 4 * config.n_embd, HEAD: config.n_embd}
        plans |= {name: ActivationQuant(None, torch.linspace(0.5, 2, n), 0.0) for name, n in smooth.items()}
    if kind in FOUR_BIT_METHODS:
        size = GROUP_SIZE
        groups = {name: round_groups(tensors[f"{name}.weight"], size) for name in bits if bits[name] == 4}
    content = quantized_state_dict(config, tensors, bits, plans, groups)
    smoothed = tuple(sorted(name.removesuffix(".smooth") for name in content if name.endswith(".smooth")))
    fine = tuple(two_level_layers(config)[:3]) if kind in ("dynamic", "static") else ()
    return Quantization(kind, bits, size, smoothed, fine), content
