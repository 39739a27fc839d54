"""From float tensors to the tensors of a quantized artifact."""

from collections.abc import Mapping

import torch
from jaxgpt.shared.config import ModelConfig
from torch import Tensor

from jaxgpt_export.format.artifact import Tensors
from jaxgpt_export.format.scheme import HEAD, linear_layers
from jaxgpt_export.model.arithmetic import pack_int4, quantize_rows
from jaxgpt_export.model.gpt import EMBEDDINGS, PARTS, layer_shapes, norm_names
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.gptq import Rounded, gptq_rows
from jaxgpt_export.quantize.smoothing import fold_smoothing


def quantized_state_dict(
    config: ModelConfig,
    tensors: Tensors,
    bits: Mapping[str, int],
    plans: Mapping[str, ActivationQuant] | None = None,
    groups: Mapping[str, Rounded] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """Make the tensors of a quantized artifact.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I).
      bits: 8, 4 or 32 for each layer of `layer_shapes`.
      plans: how inputs are quantized: steps and smoothing of static, smoothing of dynamic ones.
      groups: the integers and steps of layers with 4 bits.
      moments: sums of x x^T over the inputs of linear layers, to round 8 bits by GPTQ; to nearest without.

    Raises:
      ValueError: a weight is NaN or infinite.
    """
    sources = linear_layers(config)
    plans = {name: plan for name, plan in (plans or {}).items() if bits[sources[name]] == 8}
    smooth = {name: plan.smooth for name, plan in plans.items() if plan.smooth is not None}
    folded, result = fold_smoothing(config, tensors, smooth)
    known = {}
    for name, product in (moments or {}).items():
        vector = smooth.get(name, torch.ones(len(product)))
        if bits[sources[name]] == 8:
            known[sources[name]] = product / (vector[:, None] * vector[None])
    for name in layer_shapes(config):
        weight = folded[f"{name}.weight"]
        if bits[name] == 32:
            result[f"{name}.weight"] = weight.clone()
        elif bits[name] == 8:
            rounded = quantize_rows(weight)  # which also says what can't be rounded
            if name in known:
                rounded = gptq_rows(weight, known[name])
            result[f"{name}.weight"], result[f"{name}.weight_scale"] = rounded
        else:
            q, result[f"{name}.weight_scale"] = (groups or {})[name]
            result[f"{name}.weight_packed"] = pack_int4(q)
        if name not in (*EMBEDDINGS, HEAD):
            result[f"{name}.bias"] = folded[f"{name}.bias"]
    for name in norm_names(config):
        for part in PARTS:
            result[f"{name}.{part}"] = folded[f"{name}.{part}"]
    for name, plan in plans.items():
        if plan.scale is not None:
            result[f"{name}.input_scale"] = plan.scale.to(torch.float32).reshape(())
    return result
