"""Where smoothing vectors fold.

A smoothing vector of a layer is folded into whatever makes its input, where that is exact:

    c_attn, c_fc    into the gain and bias of ln_1, ln_2
    attn.c_proj     into the value columns of c_attn (attention mixes each channel with itself only)
    lm_head         into ln_f; where it is tied, the rows of wte are divided again at lookup
    mlp.c_proj      not at all (a GELU lies between): the vector stays with the layer
"""

from collections.abc import Mapping

from jaxgpt.shared.config import ModelConfig
from torch import Tensor

from jaxgpt_export.format.artifact import Tensors
from jaxgpt_export.format.scheme import HEAD, linear_layers
from jaxgpt_export.model.gpt import PARTS


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
