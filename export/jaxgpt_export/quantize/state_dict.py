"""From float tensors and schemes to the tensors of a quantized artifact."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxgpt.shared.architecture import PARTS, linear_layers, matrices, norms
from jaxgpt.shared.config import ModelConfig
from torch import Tensor

from jaxgpt_export.format.scheme import LayerScheme, Quantization
from jaxgpt_export.model.arithmetic import pack_int4, quantize_rows
from jaxgpt_export.model.build import Tensors, quantized_model
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.gptq import Rounded, gptq_rows
from jaxgpt_export.quantize.smoothing import fold_smoothing

Schemes = Mapping[str, LayerScheme]


@dataclasses.dataclass(frozen=True)
class QuantizedStateDict:
    """A quantized model before it is written.

    Attributes:
      quantization: what it is.
      tensors: by their names in the file.
      activations: how the inputs are quantized.
      groups: integers and scales of the layers with 4 bits.
      gptq: whether 8 bits were rounded by GPTQ.
      trained: whether the scales of inputs are those of a quantization-aware training, whose own logits it is
        then held against.
      figures: what was measured while choosing.
    """

    quantization: Quantization
    tensors: Tensors
    activations: Mapping[str, ActivationQuant] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Rounded] = dataclasses.field(default_factory=dict)
    gptq: bool = False
    trained: bool = False
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def model(self, config: ModelConfig) -> GPT:
        """Build the module."""
        return quantized_model(config, self.quantization, self.tensors)


def quantized_state_dict(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    method: str,
    schemes: Schemes,
    activations: Mapping[str, ActivationQuant] | None = None,
    groups: Mapping[str, Rounded] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    two_level: Collection[str] = (),
) -> QuantizedStateDict:
    """Round a model.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I).
      method: the label of the artifact.
      schemes: of every embedding and linear layer; smoothing and two_level follow from the next ones.
      activations: scales and smoothing of the inputs that are rounded.
      groups: the integers and scales of layers with 4 bits.
      moments: sums of x x^T over the inputs of linear layers, to round 8 bits by GPTQ; to nearest without.
      two_level: linear layers whose inputs are rounded twice, where they are rounded.

    Raises:
      ValueError: a weight is NaN or infinite.
    """
    layers, groups = linear_layers(config), groups or {}
    rounding = {name for name in layers if schemes[name].activation != "float"}
    used = {name: each for name, each in (activations or {}).items() if name in rounding}
    smooth = {name: each.smooth for name, each in used.items() if each.smooth is not None}
    folded, result = fold_smoothing(config, tensors, smooth)
    known = _smoothed_moments(config, schemes, smooth, moments or {})
    for name, layer in matrices(config).items():
        result |= _rounded(name, folded[f"{name}.weight"], schemes[name], groups.get(name), known.get(name))
        if layer.bias:
            result[f"{name}.bias"] = folded[f"{name}.bias"]
    for name in norms(config):
        for part in PARTS:
            result[f"{name}.{part}"] = folded[f"{name}.{part}"]
    for name, each in used.items():
        if each.scale is not None:
            result[f"{name}.input_scale"] = each.scale.to(torch.float32).reshape(())
    written = {
        name: dataclasses.replace(
            scheme, smoothing=f"{name}.smooth" in result, two_level=name in rounding and name in two_level
        )
        for name, scheme in schemes.items()
    }
    quantization = Quantization(method, written)
    return QuantizedStateDict(quantization, result, activations or {}, groups, bool(moments))


def _smoothed_moments(
    config: ModelConfig, schemes: Schemes, smooth: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the second moments of smoothed inputs, by the name of the matrix, where that has 8 bits."""
    found = {}
    for name, product in moments.items():
        if schemes[name].weight_bits == 8:
            vector = smooth.get(name, torch.ones(len(product)))
            found[linear_layers(config)[name].matrix] = product / (vector[:, None] * vector[None])
    return found


def _rounded(
    name: str, weight: Tensor, scheme: LayerScheme, group: Rounded | None, moments: Tensor | None
) -> Tensors:
    """Return the weight tensors of one matrix."""
    if scheme.weight_bits == 32:
        return {f"{name}.weight": weight.clone()}
    if scheme.weight_bits == 16:
        return {f"{name}.weight": weight.to(torch.float16)}
    if scheme.weight_bits == 8:
        rounded = quantize_rows(weight)  # which also says what can't be rounded
        q, scale = rounded if moments is None else gptq_rows(weight, moments)
        return {f"{name}.weight": q, f"{name}.weight_scale": scale}
    assert group is not None, f"{name} has 4 bits and no groups"
    return {f"{name}.weight_packed": pack_int4(group[0]), f"{name}.weight_scale": group[1]}
