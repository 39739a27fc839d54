"""Models with random weights: what speed needs no training for."""

from pathlib import Path

import torch
from jaxgpt_export.format.artifact import Tensors, to_hf_name, write_artifact
from jaxgpt_export.format.scheme import FOUR_BIT_METHODS, HEAD, KINDS, Quantization, linear_layers, usual_bits
from jaxgpt_export.model.gpt import EMBEDDINGS, float_model, layer_shapes, norm_names
from jaxgpt_export.quantize.activation import search_scale
from jaxgpt_export.quantize.calibration import collect_inputs
from jaxgpt_export.quantize.gptq import Rounded, round_groups
from jaxgpt_export.quantize.state_dict import quantized_state_dict

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset
from jaxgpt.shared.tokenizer import Tokenizer, spell

RANDOM_VOCAB_SIZE = 50_257
GROUP_SIZE = 32  # of 4-bit weights


def random_artifacts(preset: str, scratch: Path) -> list[Path]:
    """Write artifacts of a preset's shape with random weights: float32 and every kind but static-qat.

    They have no certificate: nothing but their speed means anything.
    """
    config = find_preset(preset).model(RANDOM_VOCAB_SIZE)
    say(f"making random weights of the shape of {preset}")
    tensors = random_tensors(config)
    tokenizer = placeholder_tokenizer(config.vocab_size)
    hf = {}
    for name, tensor in tensors.items():
        conv1d = tensor.ndim == 2 and not name.startswith((*EMBEDDINGS, HEAD))
        hf[to_hf_name(name)] = tensor.t() if conv1d else tensor
    model = float_model(config, tensors)
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    plans = {
        name: search_scale(seen, tensors[f"{linear_layers(config)[name]}.weight"], (1.0,), ())
        for name, seen in collect_inputs(model, tokens.int()).items()
    }
    del model
    bits = dict.fromkeys(layer_shapes(config), 8)
    made: list[tuple[str, Quantization | None, Tensors]] = [
        ("fp32", None, hf),
        ("int8-dynamic", Quantization("dynamic", bits), quantized_state_dict(config, tensors, bits)),
        ("int8-static", Quantization("static", bits), quantized_state_dict(config, tensors, bits, plans)),
        (
            "int8-weight-only",
            Quantization("weight-only-int8", bits),
            quantized_state_dict(config, tensors, bits),
        ),
    ]
    groups: dict[str, Rounded] = {}
    for method in reversed(FOUR_BIT_METHODS):
        fours = usual_bits(config, method)
        wanted = [name for name in fours if fours[name] == 4 and name not in groups]
        groups |= {name: round_groups(tensors[f"{name}.weight"], GROUP_SIZE) for name in wanted}
        content = quantized_state_dict(config, tensors, fours, groups=groups)
        made.append((KINDS[method], Quantization(method, fours, GROUP_SIZE), content))
    for name, quantization, content in made:
        (scratch / name).mkdir()
        write_artifact(scratch / name, config, quantization, content, tokenizer)
    return [scratch / name for name, _, _ in made]


def random_tensors(config: ModelConfig) -> Tensors:
    """Return float tensors by module name, N(0, 0.02), every one non-zero."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for name, (O, I) in layer_shapes(config).items():
        tensors[f"{name}.weight"] = torch.randn(O, I, generator=generator) * 0.02
        if name not in (*EMBEDDINGS, HEAD):
            tensors[f"{name}.bias"] = torch.randn(O, generator=generator) * 0.02
    for name in norm_names(config):
        tensors[f"{name}.weight"] = 1 + torch.randn(config.n_embd, generator=generator) * 0.02
        tensors[f"{name}.bias"] = torch.randn(config.n_embd, generator=generator) * 0.02
    return tensors


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of that size whose merges mean nothing (pairs of bytes, of pairs, ...)."""
    letters = [spell(bytes([b])) for b in range(256)]
    merges: list[str] = []
    for first in letters:
        for second in letters:
            if len(merges) == vocab_size - 257:
                return Tokenizer(merges, "placeholder")
            merges.append(f"{first} {second}")
    raise UserError(f"no placeholder tokenizer has {vocab_size} tokens")
