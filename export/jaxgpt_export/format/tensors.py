"""Which tensors a quantized artifact holds."""

import torch
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import HEAD, Quantization, linear_layers
from jaxgpt_export.model.gpt import EMBEDDINGS, layer_shapes, norm_names

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


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
