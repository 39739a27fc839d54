"""What a quantized artifact is made of: its section in config.json, its tensors, its module.

    quantization.format_version    2
    quantization.method            dynamic | static | static-qat | weight-only-int8 | weight-only-int4 |
                                   weight-only-int4-head
    quantization.bits              of each layer's weights: 8, 4, or 32 where a layer was left in float32
    quantization.group_size        input channels that share a step, of the layers with 4 bits; 0 without any
    quantization.smooth            names of the layers that have a smoothing vector
    quantization.fine              names of the linear layers whose input is rounded twice

    8 bits    NAME.weight          (O, I) int8
              NAME.weight_scale    (O,) float32
    4 bits    NAME.weight_packed   (O, I / 2) uint8, two weights a byte; the blocks' matrices and the head
              NAME.weight_scale    (O, I / group_size) bfloat16
    32 bits   NAME.weight          (O, I) float32
    any       NAME.input_scale     () float32       static input, 8 bits; also lm_head.input_scale
              NAME.smooth          (I,) float32     by which the input is divided (wte: by which rows are)
              NAME.bias, ln_*      float32

NAME is wte, wpe, lm_head (where the head is not tied) or one of the four matrices of a block. A tied head has
no tensor but its input_scale: it is wte. `export.arithmetic` says what the numbers mean.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxgpt.config import ModelConfig
from jaxgpt.shared.errors import UserError, damaged, quoted
from torch import Tensor, nn

from export.layers import Int8Linear, QuantizedEmbedding, WeightOnlyLinear
from export.model import EMBEDDINGS, GPT, PARTS, float_linear, layer_shapes, norm_names

QUANTIZATION_FORMAT_VERSION = 2
# method -> name of the row in reports
KINDS = {
    "dynamic": "int8-dynamic",
    "static": "int8-static",
    "static-qat": "int8-static-qat",
    "weight-only-int8": "int8-weight-only",
    "weight-only-int4": "int4-weight-only",
    "weight-only-int4-head": "int4-weight-only-head",
}
FOUR_BIT_METHODS = ("weight-only-int4-head", "weight-only-int4")
HEAD = "lm_head"

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The section `quantization` of config.json; see the module's docstring.

    Attributes:
      method: one of KINDS.
      bits: of every layer of `layer_shapes`, by name.
      group_size: of the layers with 4 bits.
      smooth: layers with a smoothing vector, in order.
      fine: linear layers whose input is rounded twice, in order.
    """

    method: str
    bits: Mapping[str, int]
    group_size: int = 0
    smooth: tuple[str, ...] = ()
    fine: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Name of the row in reports."""
        return KINDS[self.method]

    @property
    def static(self) -> bool:
        """Whether inputs have stored steps."""
        return self.method in ("static", "static-qat")

    @property
    def weight_only(self) -> bool:
        """Whether inputs stay float."""
        return self.method.startswith("weight-only")

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "format_version": QUANTIZATION_FORMAT_VERSION,
            "method": self.method,
            "bits": dict(self.bits),
            "group_size": self.group_size,
            "smooth": list(self.smooth),
            "fine": list(self.fine),
        }


def read_quantization(section: Any, config: ModelConfig, path: Path) -> Quantization:
    """Check the section of a config.json.

    Raises:
      UserError: it is of another version, or holds what no artifact has.
    """
    if not isinstance(section, dict) or section.get("format_version") != QUANTIZATION_FORMAT_VERSION:
        version = section.get("format_version") if isinstance(section, dict) else None
        raise UserError(
            f"{path}: quantization format version {quoted(version)}, this program reads "
            f"{QUANTIZATION_FORMAT_VERSION}; quantize the fp32 artifact again"
        )
    if not isinstance(section.get("method"), str) or section["method"] not in KINDS:
        raise UserError(
            f"{path}: quantization method {quoted(section.get('method'))} is unknown; "
            f"expected {', '.join(KINDS)}"
        )
    with damaged(path, "quantize the fp32 artifact again"):
        found = Quantization(
            str(section["method"]),
            section["bits"],
            section["group_size"],
            tuple(section["smooth"]),
            tuple(section["fine"]),
        )
        if section != found.to_json():
            raise ValueError("its quantization section holds unknown fields")
        shapes = layer_shapes(config)
        if other := sorted(set(found.bits) ^ set(shapes)):
            raise ValueError(f"bits and shape disagree on the layers {', '.join(other)}")
        if not all(type(bits) is int for bits in (*found.bits.values(), found.group_size)):
            raise ValueError("bits and group_size are whole numbers")
        if not set(found.bits.values()) <= {4, 8, 32}:
            raise ValueError(f"bits are {sorted(set(found.bits.values()))}, expected 4, 8 or 32")
        fours = [name for name, bits in found.bits.items() if bits == 4]
        usual = usual_bits(config, found.method)
        if more := [name for name in fours if usual[name] != 4]:
            raise ValueError(f"method {found.method} gives {more[0]} no 4 bits")
        size = found.group_size
        if bool(fours) != bool(size) or any(size < 2 or shapes[name][1] % size for name in fours):
            raise ValueError(f"group_size {size} does not divide the layers' inputs")
        if any(shapes[name][1] % 2 for name in fours):
            raise ValueError("4 bits, two to a byte, want an even number of inputs")
        movable = {name for name in shapes if name.endswith("mlp.c_proj")}
        movable |= {"wte"} if config.tied else set()
        movable = {name for name in movable if found.bits[name] == 8}
        if not set(found.smooth) <= movable or (found.weight_only and found.smooth):
            raise ValueError(f"smoothing of {', '.join(found.smooth)} is not kept by any layer")
        rounding = {name for name, source in linear_layers(config).items() if found.bits[source] == 8}
        if not set(found.fine) <= rounding or (found.weight_only and found.fine):
            raise ValueError(f"inputs of {', '.join(found.fine)} are not rounded, so not twice")
    return found


def quantized_shapes(config: ModelConfig, quantization: Quantization) -> Shapes:
    """Return dtype and shape of every tensor of a quantized artifact, by its name in the file."""
    f32 = torch.float32
    expected: Shapes = {}
    for name in norm_names(config):
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (f32, (config.n_embd,))
    for name, (O, I) in layer_shapes(config).items():
        bits = quantization.bits[name]
        if name not in (*EMBEDDINGS, HEAD):
            expected[f"{name}.bias"] = (f32, (O,))
        if bits == 32:
            expected[f"{name}.weight"] = (f32, (O, I))
        elif bits == 8:
            expected[f"{name}.weight"] = (torch.int8, (O, I))
            expected[f"{name}.weight_scale"] = (f32, (O,))
        else:
            groups = I // quantization.group_size
            expected[f"{name}.weight_packed"] = (torch.uint8, (O, I // 2))
            expected[f"{name}.weight_scale"] = (torch.bfloat16, (O, groups))
        if name in quantization.smooth:
            expected[f"{name}.smooth"] = (f32, (I,))
    if quantization.static:
        for name, source in linear_layers(config).items():
            if quantization.bits[source] == 8:
                expected[f"{name}.input_scale"] = (f32, ())
    return expected


def usual_bits(config: ModelConfig, method: str) -> dict[str, int]:
    """Return the bits of every layer's weights where a method keeps nothing back."""
    bits = dict.fromkeys(layer_shapes(config), 8)
    if method in FOUR_BIT_METHODS:
        bits |= {name: 4 for name in bits if name not in (*EMBEDDINGS, HEAD)}
    if method == "weight-only-int4-head":
        bits[linear_layers(config)[HEAD]] = 4
    return bits


def linear_layers(config: ModelConfig) -> dict[str, str]:
    """Return every linear layer, the head included, with the name of the matrix that it multiplies with."""
    found = {name: name for name in layer_shapes(config) if name not in EMBEDDINGS}
    return {**found, HEAD: "wte" if config.tied else HEAD}


def quantized_model(config: ModelConfig, quantization: Quantization, tensors: Mapping[str, Tensor]) -> GPT:
    """Build the module of a quantized artifact from its tensors."""
    layers: dict[str, nn.Module] = {}
    for name in EMBEDDINGS:
        if name in layer_shapes(config):
            layers[name] = _embedding(name, quantization, tensors)
    for name, source in linear_layers(config).items():
        layers[name] = _linear(name, source, quantization, tensors)
    model = GPT(config, layers, exact=not quantization.weight_only)
    norms = {f"{name}.{part}": tensors[f"{name}.{part}"] for name in norm_names(config) for part in PARTS}
    model.load_state_dict(norms, strict=False)
    return model.eval().requires_grad_(False)


def _embedding(name: str, quantization: Quantization, tensors: Mapping[str, Tensor]) -> nn.Module:
    bits = quantization.bits[name]
    if bits == 32:
        return nn.Embedding.from_pretrained(tensors[f"{name}.weight"])
    weight = tensors[f"{name}.weight" if bits == 8 else f"{name}.weight_packed"]
    return QuantizedEmbedding(weight, tensors[f"{name}.weight_scale"], tensors.get(f"{name}.smooth"))


def _linear(name: str, source: str, quantization: Quantization, tensors: Mapping[str, Tensor]) -> nn.Module:
    bits, bias = quantization.bits[source], tensors.get(f"{name}.bias")
    if bits == 32:
        return float_linear(tensors[f"{source}.weight"], bias)
    weight = tensors[f"{source}.weight" if bits == 8 else f"{source}.weight_packed"]
    scale = tensors[f"{source}.weight_scale"]
    if quantization.weight_only:
        return WeightOnlyLinear(weight, scale, bias)
    # The head's own smoothing is folded into ln_f, so only the rows of the embedding are divided.
    smooth = None if name == HEAD else tensors.get(f"{name}.smooth")
    fine = name in quantization.fine
    return Int8Linear(weight, scale, bias, tensors.get(f"{name}.input_scale"), smooth, fine)
