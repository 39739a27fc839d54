"""The module of an artifact: from arrays to tensors, from each layer's scheme to its layer class."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxgpt.shared.architecture import HEAD, PARTS, linear_layers, matrices, norms
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.tensor_file import BFLOAT16, Array, Arrays
from jaxtyping import Float
from torch import Tensor, nn

from jaxgpt_export.format.artifact import Artifact, read_certified_artifact
from jaxgpt_export.format.scheme import LayerScheme, Quantization
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.model.int4_linear import Int4Linear
from jaxgpt_export.model.int8_linear import Int8Linear
from jaxgpt_export.model.weight_only import QuantizedEmbedding, WeightOnlyLinear

Tensors = dict[str, Tensor]


def load(folder: str | Path) -> GPT:
    """Return the module of an artifact folder; `model(tokens)` gives logits (B, T, V).

    Raises:
      UserError: the folder is no artifact, a file was altered, or a tensor is missing, extra, wrongly shaped
        or not finite.
    """
    return build_model(read_certified_artifact(Path(folder)))


def build_model(artifact: Artifact) -> GPT:
    """Build the PyTorch module of an artifact that was read."""
    tensors = as_tensors(artifact.tensors)
    if artifact.quantization is None:
        return float_model(artifact.config, tensors)
    return quantized_model(artifact.config, artifact.quantization, tensors)


def as_tensors(arrays: Mapping[str, Array]) -> Tensors:
    """Return arrays as tensors over the same memory."""
    return {name: as_tensor(array) for name, array in arrays.items()}


def as_tensor(array: Array) -> Tensor:
    """Return an array as a tensor over the same memory."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors as arrays, over the same memory where they are contiguous."""
    return {name: as_array(tensor) for name, tensor in tensors.items()}


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array, over the same memory where it is contiguous."""
    whole = tensor.detach().contiguous()
    return whole.view(torch.uint16).numpy().view(BFLOAT16) if whole.dtype == torch.bfloat16 else whole.numpy()


def float_model(config: ModelConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """Build the float32 module.

    Args:
      config: shape.
      tensors: by module name: "wte.weight", "h.0.attn.c_attn.weight" (O, I), ".bias", "ln_f.weight", ...
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in matrices(config).items():
        weight = tensors[f"{name}.weight"]
        if layer.role == "embedding":
            layers[name] = nn.Embedding.from_pretrained(weight)
        else:
            layers[name] = float_linear(weight, tensors.get(f"{name}.bias"))
    if config.tied:
        layers[HEAD] = float_linear(tensors["wte.weight"], None)
        layers[HEAD].weight = layers["wte"].weight
    return _with_norms(GPT(config, layers), tensors)


def quantized_model(config: ModelConfig, quantization: Quantization, tensors: Mapping[str, Tensor]) -> GPT:
    """Build the module of a quantized artifact from its tensors, by their names in the file.

    It computes with float16 weights as float32.
    """
    schemes = quantization.layers
    tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    layers: dict[str, nn.Module] = {
        name: _embedding(name, schemes[name], tensors)
        for name, layer in matrices(config).items()
        if layer.role == "embedding"
    }
    for name, layer in linear_layers(config).items():
        layers[name] = _linear(name, layer.matrix, schemes[name], tensors)
    return _with_norms(GPT(config, layers, exact=quantization.rounds_inputs), tensors)


def _with_norms(model: GPT, tensors: Mapping[str, Tensor]) -> GPT:
    parts = {f"{name}.{part}": tensors[f"{name}.{part}"] for name in norms(model.config) for part in PARTS}
    model.load_state_dict(parts, strict=False)
    return model.eval().requires_grad_(False)


def _embedding(name: str, scheme: LayerScheme, tensors: Mapping[str, Tensor]) -> nn.Module:
    if scheme.is_float:
        return nn.Embedding.from_pretrained(tensors[f"{name}.weight"])
    weight = tensors[f"{name}.weight" if scheme.weight_bits == 8 else f"{name}.weight_packed"]
    scale, smooth = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.smooth")
    return QuantizedEmbedding(weight, scale, smooth, tensors.get(f"{name}.group_factor"))


def _linear(name: str, matrix: str, scheme: LayerScheme, tensors: Mapping[str, Tensor]) -> nn.Module:
    bias = tensors.get(f"{name}.bias")
    if scheme.is_float:
        return float_linear(tensors[f"{matrix}.weight"], bias)
    weight = tensors[f"{matrix}.weight" if scheme.weight_bits == 8 else f"{matrix}.weight_packed"]
    scale = tensors[f"{matrix}.weight_scale"]
    if scheme.activation == "float":
        return WeightOnlyLinear(weight, scale, bias)
    # A head's own smoothing is folded into ln_f, so only the rows of the embedding are divided.
    smooth = tensors[f"{name}.smooth"] if scheme.smoothing else None
    more = (tensors.get(f"{name}.input_scale"), smooth, scheme.two_level)
    if scheme.weight_bits == 4:
        return Int4Linear(weight, scale, tensors[f"{matrix}.group_factor"], bias, *more)
    return Int8Linear(weight, scale, bias, *more)


def float_linear(weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> nn.Linear:
    """Return a float32 layer that holds these very tensors."""
    O, I = weight.shape
    layer = nn.Linear(I, O, bias=bias is not None, device="meta")
    layer.load_state_dict(
        {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, assign=True
    )
    return layer.requires_grad_(False)
