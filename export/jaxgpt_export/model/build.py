"""The module of an artifact: a layer class for each layer."""

from collections.abc import Mapping

from jaxgpt.shared.config import ModelConfig
from torch import Tensor, nn

from jaxgpt_export.format.scheme import HEAD, Quantization, linear_layers
from jaxgpt_export.model.gpt import EMBEDDINGS, GPT, PARTS, float_linear, layer_shapes, norm_names
from jaxgpt_export.model.int8_linear import Int8Linear
from jaxgpt_export.model.weight_only import QuantizedEmbedding, WeightOnlyLinear


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
