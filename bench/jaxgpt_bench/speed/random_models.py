"""Models with random weights: what speed needs no training for."""

import itertools
from collections.abc import Collection
from pathlib import Path

import torch
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.scheme import LayerScheme, has_factors
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.model.build import Tensors, as_arrays, float_model
from jaxgpt_export.quantize.activation import ActivationQuant, Search, search_scale
from jaxgpt_export.quantize.calibration import collect_inputs
from jaxgpt_export.quantize.gptq import Rounded, round_groups
from jaxgpt_export.quantize.methods import all_methods
from jaxgpt_export.quantize.state_dict import quantized_state_dict

from jaxgpt.shared.architecture import linear_layers, parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, nearest
from jaxgpt.shared.presets import find_preset
from jaxgpt.shared.tokenizer import Tokenizer, spell

RANDOM_VOCAB_SIZE = 50_257


def random_artifacts(preset: str, scratch: Path, kinds: Collection[str] = ()) -> list[Path]:
    """Write artifacts of a preset's shape with random weights: float32, and by every method that takes it.

    They have no certificate: nothing but their speed means anything.

    Args:
      preset: of the shape.
      scratch: where their folders go.
      kinds: that are wanted beside float32; none: all.

    Raises:
      UserError: no preset has that name, or no method one of those kinds.
    """
    for kind in kinds:
        if kind not in (known := ["fp32", *all_methods()]):
            raise UserError(f"--kind {kind!r} is none of the artifacts' kinds; {nearest(kind, known)}")
    config = find_preset(preset).model(RANDOM_VOCAB_SIZE)
    say(f"making random weights of the shape of {preset}")
    tensors = random_tensors(config)
    tokenizer = placeholder_tokenizer(config.vocab_size)
    folders = [scratch / "fp32"]
    folders[0].mkdir()
    write_artifact(folders[0], config, None, to_hf_layout(as_arrays(tensors), config), tokenizer)
    plain = read_artifact(folders[0])
    scales, groups = _min_max_scales(config, tensors), _Groups(config, tensors)
    methods = [
        method
        for method in all_methods().values()
        if method.obstacle(plain) is None and (not kinds or method.name in kinds)
    ]
    for method in sorted(methods, key=lambda each: (-each.cost(config)[0], each.name)):
        schemes = method.schemes(config)
        activations = {name: each for name, each in scales.items() if schemes[name].activation == "static"}
        found = quantized_state_dict(config, tensors, method.name, schemes, activations, groups.of(schemes))
        folders.append(scratch / method.name)
        folders[-1].mkdir()
        write_artifact(folders[-1], config, found.quantization, as_arrays(found.tensors), tokenizer)
    return folders


def _min_max_scales(config: ModelConfig, tensors: Tensors) -> dict[str, ActivationQuant]:
    """Return static scales that clip nothing on a few random tokens."""
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    seen = collect_inputs(float_model(config, tensors), tokens.int())
    return {
        name: search_scale(seen[name], tensors[f"{layer.matrix}.weight"], Search(covered=(1.0,)))
        for name, layer in linear_layers(config).items()
    }


class _Groups:
    """Integers and scales of 4-bit matrices, rounded to nearest once each."""

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        self._config, self._tensors = config, tensors
        self._rounded: dict[tuple[str, bool], Rounded] = {}

    def of(self, schemes: dict[str, LayerScheme]) -> dict[str, Rounded]:
        """Return those that schemes ask for."""
        found = {}
        for name, scheme in schemes.items():
            weight = self._tensors.get(f"{name}.weight")
            if scheme.weight_bits == 4 and weight is not None:
                key = name, has_factors(name, schemes, self._config)
                if key not in self._rounded:
                    self._rounded[key] = round_groups(weight, scheme.group_size, key[1])
                found[name] = self._rounded[key]
        return found


def random_tensors(config: ModelConfig) -> Tensors:
    """Return float tensors by module name, N(0, 0.02), every one non-zero; gains N(1, 0.02)."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], mean: float) -> torch.Tensor:
        return mean + torch.randn(shape, generator=generator) * 0.02

    return {
        each.name: draw(each.shape, float(each.layer.role == "norm" and each.part == "weight"))
        for each in parameters(config)
    }


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of that size whose merges mean nothing: pairs of printable characters, and threes.

    What is generated is text, which servers send token by token; parts of characters they hold back.
    """
    letters = [spell(bytes([b])) for b in range(0x21, 0x7F)]
    pairs = [f"{first} {second}" for first in letters for second in letters]
    threes = (f"{pair.replace(' ', '')} {letter}" for pair in pairs for letter in letters)
    merges = list(itertools.islice(itertools.chain(pairs, threes), vocab_size - 257))
    if len(merges) == vocab_size - 257:
        return Tokenizer(merges, "placeholder")
    raise UserError(f"no placeholder tokenizer has {vocab_size} tokens")
