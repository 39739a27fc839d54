"""Where smoothing vectors fold.

A smoothing vector of a layer is folded into whatever makes its input, where that is exact:

    c_attn, c_fc    into the gain and bias of ln_1, ln_2
    attn.c_proj     into the value columns of c_attn (attention mixes each channel with itself only)
    lm_head         into ln_f; where it is tied, the rows of wte are divided again at lookup
    mlp.c_proj      not at all (a GELU lies between): the vector stays with the layer

Which layer's input is made by what stands in the table of `jaxgpt.shared.architecture`.
"""

from collections.abc import Mapping

from jaxgpt.shared.architecture import PARTS, linear_layers
from jaxgpt.shared.config import ModelConfig
from torch import Tensor

from jaxgpt_export.model.build import Tensors


def fold_smoothing(
    config: ModelConfig, tensors: Mapping[str, Tensor], smooth: Mapping[str, Tensor]
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
    layers = linear_layers(config)
    for name, vector in smooth.items():
        layer = layers[name]
        new[f"{layer.matrix}.weight"] = new[f"{layer.matrix}.weight"] * vector
        if layer.norm is not None:
            for part in PARTS:
                new[f"{layer.norm}.{part}"] = new[f"{layer.norm}.{part}"] / vector
            if layer.tied_to is not None:
                kept[f"{layer.tied_to}.smooth"] = vector
        elif layer.values is not None:
            for part in PARTS:
                columns = new[f"{layer.values}.{part}"].clone()
                columns[-C:] /= vector[:, None] if part == "weight" else vector
                new[f"{layer.values}.{part}"] = columns
        else:
            kept[f"{name}.smooth"] = vector
    return new, kept
