"""What happens to each layer of a quantized artifact: data, written out in config.json.

    quantization.format_version    3
    quantization.method            a label: how the artifact was made; nothing that reads it depends on it
    quantization.layers            the scheme of every embedding and linear layer, by GPT-2's name:
        weight_bits    8, 4, 16 (float16), or 32 where the layer was left in float32
        group_size     input channels that share a scale of 4-bit weights; 0 where a row has one scale
        activation     how the input is rounded: float (not at all), dynamic (a scale a token) or static (a
                       stored scale)
        smoothing      the input is divided by a stored vector first (of an embedding: its rows are)
        two_level      what the first rounding of the input leaves is rounded too, in 256ths of its scale

A tied head multiplies with wte: its weight_bits and group_size are those of wte, and its own smoothing is
folded into ln_f and kept with wte. `model.arithmetic` says what the numbers mean; format/tensors.py which
tensors follow. Artifacts of format version 2, which told most of this by the method's name, are read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxgpt.shared.architecture import HEAD, linear_layers, matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError, damaged, quoted

QUANTIZATION_FORMAT_VERSION = 3
MAX_LABEL_LENGTH = 64

Activation = Literal["float", "dynamic", "static"]
WEIGHT_BITS = (4, 8, 16, 32)

# Format version 2: method -> the label it has now, the activation of layers whose weights are rounded.
_METHODS_IN_VERSION_2: dict[str, tuple[str, Activation]] = {
    "dynamic": ("int8-dynamic", "dynamic"),
    "static": ("int8-static", "static"),
    "static-qat": ("int8-static-qat", "static"),
    "weight-only-int8": ("int8-weight-only", "float"),
    "weight-only-int4": ("int4-weight-only", "float"),
    "weight-only-int4-head": ("int4-weight-only-head", "float"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What happens to one layer.

    Attributes:
      weight_bits: of a weight; 16 is float16, 32 float32, not rounded.
      group_size: input channels that share a scale of 4-bit weights; 0: a row has one scale.
      activation: how the input is rounded to 8 bits; float: not at all.
      smoothing: the input is divided by a stored vector (an embedding's rows are).
      two_level: the residual of the input's rounding is rounded too.
    """

    weight_bits: int = 8
    group_size: int = 0
    activation: Activation = "float"
    smoothing: bool = False
    two_level: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the weights are floats."""
        return self.weight_bits >= 16


FLOAT32 = LayerScheme(weight_bits=32)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The section `quantization` of config.json; see the module's docstring.

    Attributes:
      method: the label.
      layers: the scheme of each embedding and linear layer, a tied head among them.
    """

    method: str
    layers: Mapping[str, LayerScheme]

    @property
    def rounds_inputs(self) -> bool:
        """Whether any layer's input is rounded: then what lies between layers is computed in float64."""
        return any(scheme.activation != "float" for scheme in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        layers = {name: dataclasses.asdict(scheme) for name, scheme in self.layers.items()}
        return {"format_version": QUANTIZATION_FORMAT_VERSION, "method": self.method, "layers": layers}


def read_quantization(section: Any, config: ModelConfig, path: Path) -> Quantization:
    """Check the section of a config.json.

    Args:
      section: as JSON gives it.
      config: shape of the model.
      path: of config.json, for messages.

    Raises:
      UserError: it is of another version, or holds what no artifact has.
    """
    version = section.get("format_version") if isinstance(section, dict) else None
    if version not in (2, QUANTIZATION_FORMAT_VERSION):
        raise UserError(
            f"{path}: quantization format version {quoted(version)}, this program reads "
            f"{QUANTIZATION_FORMAT_VERSION} and 2; quantize the fp32 artifact again"
        )
    with damaged(path, "quantize the fp32 artifact again"):
        if version == 2:
            found = _from_version_2(section, config, path)
        else:
            layers = {name: _scheme_from_json(name, value) for name, value in section["layers"].items()}
            found = Quantization(_label(section["method"]), layers)
            if section != found.to_json():
                raise ValueError("its quantization section holds unknown fields")
        _check(found, config)
    return found


def _label(method: Any) -> str:
    """Return the label of an artifact; ValueError where it is none."""
    if not isinstance(method, str) or not 0 < len(method) <= MAX_LABEL_LENGTH:
        raise ValueError(f"method is {quoted(method)}, expected a name")
    return method


def _scheme_from_json(name: str, value: Mapping[str, Any]) -> LayerScheme:
    """Read the scheme of a layer; every field has the type that it is written with."""
    fields = {field.name: field for field in dataclasses.fields(LayerScheme)}
    if other := sorted(set(value) ^ set(fields)):
        raise ValueError(f"the scheme of {name} has, or lacks, {', '.join(map(str, other))}")
    for field in fields.values():
        if type(value[field.name]) is not type(field.default):
            raise ValueError(f"{field.name} of {name} is {quoted(value[field.name])}")
    if value["activation"] not in get_args(Activation):
        raise ValueError(f"activation of {name} is {quoted(value['activation'])}")
    return LayerScheme(**value)


def _from_version_2(section: dict[str, Any], config: ModelConfig, path: Path) -> Quantization:
    """Turn the section of format version 2 (method, bits, group_size, smooth, fine) into schemes."""
    method, names = (
        section.get("method"),
        {"format_version", "method", "bits", "group_size", "smooth", "fine"},
    )
    if not isinstance(method, str) or method not in _METHODS_IN_VERSION_2:
        raise UserError(
            f"{path}: quantization method {quoted(method)} is unknown; "
            f"expected {', '.join(_METHODS_IN_VERSION_2)}"
        )
    if set(section) != names:
        raise ValueError("its quantization section holds unknown fields")
    label, activation = _METHODS_IN_VERSION_2[method]
    bits, group_size = dict(section["bits"]), section["group_size"]
    smooth, two_level = set(section["smooth"]), set(section["fine"])
    if not all(type(each) is int for each in (*bits.values(), group_size)):
        raise ValueError("bits and group_size are whole numbers")
    linear = linear_layers(config)
    if other := sorted(set(bits) ^ set(matrices(config))):
        raise ValueError(f"bits and shape disagree on the layers {', '.join(map(str, other))}")
    if other := sorted((smooth | two_level) - {*bits, *linear}):
        raise ValueError(f"smooth or fine name {', '.join(map(str, other))}, which are no layers")
    layers = {}
    for name in (*matrices(config), *(() if HEAD in bits else (HEAD,))):
        weight_bits = bits[linear[name].matrix if name in linear else name]
        rounds_input = name in linear and weight_bits != 32
        layers[name] = LayerScheme(
            weight_bits=weight_bits,
            group_size=group_size if weight_bits == 4 else 0,
            activation=activation if rounds_input else "float",
            smoothing=name in smooth,
            two_level=name in two_level,
        )
    if bool(group_size) != (4 in bits.values()):
        raise ValueError(f"group_size {group_size} does not divide the layers' inputs")
    return Quantization(label, layers)


def _check(quantization: Quantization, config: ModelConfig) -> None:
    """Raise ValueError for schemes that no artifact has, or that do not fit the shape."""
    stored, linear = matrices(config), linear_layers(config)
    if other := sorted({*stored, *linear} ^ set(quantization.layers)):
        raise ValueError(f"schemes and shape disagree on the layers {', '.join(map(str, other))}")
    for name, scheme in quantization.layers.items():
        inputs = (stored.get(name) or linear[name]).inputs
        if scheme.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits of {name} is {scheme.weight_bits}, expected 4, 8, 16 or 32")
        if scheme.weight_bits == 4:
            if scheme.group_size < 2 or inputs % scheme.group_size:
                raise ValueError(f"group_size {scheme.group_size} does not divide the inputs of {name}")
            if inputs % 2:
                raise ValueError("4 bits, two to a byte, want an even number of inputs")
        elif scheme.group_size:
            raise ValueError(f"{name} has {scheme.weight_bits} bits and a group_size")
        if scheme.activation != "float" and (scheme.weight_bits != 8 or name not in linear):
            raise ValueError(f"the input of {name} can't be rounded: it is no linear layer of 8 bits")
        if scheme.two_level and scheme.activation == "float":
            raise ValueError(f"inputs of {name} are not rounded, so not twice")
    _check_smoothing(quantization, config)
    if config.tied:
        head, table = quantization.layers[HEAD], quantization.layers["wte"]
        if (head.weight_bits, head.group_size) != (table.weight_bits, table.group_size):
            raise ValueError("the head is wte, their schemes give other weights")


def _check_smoothing(quantization: Quantization, config: ModelConfig) -> None:
    """Raise ValueError where a smoothing vector is kept by a layer that keeps none."""
    linear = linear_layers(config)
    for name, scheme in quantization.layers.items():
        if not scheme.smoothing:
            continue
        rounding = quantization.layers[HEAD if name == "wte" else name].activation != "float"
        kept = config.tied if name == "wte" else name in linear and keeps_smoothing(name, config)
        if not (kept and rounding and scheme.weight_bits == 8):
            raise ValueError(f"smoothing of {name} is not kept by any layer")


def keeps_smoothing(name: str, config: ModelConfig) -> bool:
    """Whether a smoothing vector of a linear layer stays with it, having nothing linear to fold into."""
    layer = linear_layers(config)[name]
    return layer.norm is None and layer.values is None
