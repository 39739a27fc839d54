"""From float tensors to the tensors of a quantized artifact: folding smoothing vectors, rounding rows.

A smoothing vector of a layer is folded into whatever makes its input, where that is exact:

    c_attn, c_fc    into the gain and bias of ln_1, ln_2
    attn.c_proj     into the value columns of c_attn (attention mixes each channel with itself only)
    lm_head         into ln_f; where it is tied, the rows of wte are divided again at lookup
    mlp.c_proj      not at all (a GELU lies between): the vector stays with the layer
"""

from collections.abc import Mapping

import torch
from jaxgpt.config import ModelConfig
from torch import Tensor

from export.arithmetic import pack_int4, quantize_rows
from export.artifact import Tensors
from export.model import EMBEDDINGS, PARTS, layer_shapes, norm_names
from export.quantization import HEAD, linear_layers
from export.quantize.calibration import InputPlan
from export.quantize.gptq import Rounded, gptq_rows


def fold_smoothing(
    config: ModelConfig, tensors: Tensors, smooth: Mapping[str, Tensor]
) -> tuple[Tensors, Tensors]:
    """Fold smoothing vectors into the weights.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I); not changed.
      smooth: vectors (I,) by layer name (lm_head for the head).

    Returns:
      The new float tensors, and the vectors that stay with the artifact ("h.N.mlp.c_proj.smooth",
      "wte.smooth").
    """
    new, kept = dict(tensors), {}
    C = config.n_embd
    for name, vector in smooth.items():
        weight = f"{linear_layers(config)[name]}.weight"
        new[weight] = new[weight] * vector
        block = name.rpartition(".attn.")[0] or name.rpartition(".mlp.")[0]
        if name == HEAD:
            _divide_norm(new, "ln_f", vector)
            if config.tied:
                kept["wte.smooth"] = vector
        elif name.endswith("attn.c_attn"):
            _divide_norm(new, f"{block}.ln_1", vector)
        elif name.endswith("mlp.c_fc"):
            _divide_norm(new, f"{block}.ln_2", vector)
        elif name.endswith("attn.c_proj"):
            for part in PARTS:
                values = new[f"{block}.attn.c_attn.{part}"].clone()
                values[2 * C :] /= vector[:, None] if part == "weight" else vector
                new[f"{block}.attn.c_attn.{part}"] = values
        else:
            kept[f"{name}.smooth"] = vector
    return new, kept


def _divide_norm(tensors: Tensors, norm: str, vector: Tensor) -> None:
    for part in PARTS:
        tensors[f"{norm}.{part}"] = tensors[f"{norm}.{part}"] / vector


def rounded_tensors(
    config: ModelConfig,
    tensors: Tensors,
    bits: Mapping[str, int],
    plans: Mapping[str, InputPlan] | None = None,
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
