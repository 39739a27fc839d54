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
no tensor but its input_scale: it is wte. `model.arithmetic` says what the numbers mean.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError, damaged, quoted

from jaxgpt_export.model.gpt import EMBEDDINGS, layer_shapes

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
