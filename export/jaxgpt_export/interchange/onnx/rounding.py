"""Matrices rounded to nearest for the graph's operators, and the float32 weights that these stand for.

int8-dynamic       int8, a scale a row (DynamicQuantizeMatMul)
int8-weight-only   uint8 about 128, a scale a block of up to 128 weights of a row (MatMulNBits)
int4-weight-only   uint4 about 8, likewise, two to a byte
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.tensor_file import Arrays

from jaxgpt_export.interchange.blocks import block_size_for, round_blocks
from jaxgpt_export.interchange.onnx.precision import BITS, Precision


def round_rows(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a matrix (O, I) to int8; scale (O,) = largest of a row / 127."""
    scale = np.maximum(np.abs(weight).max(axis=1) / 127, np.finfo(np.float32).tiny)
    return np.rint(weight.T / scale).astype(np.int8).T, scale.astype(np.float32)


def rounded(weight: npt.NDArray[np.float32], precision: Precision) -> npt.NDArray[np.float32]:
    """Return the float32 matrix (O, I) that a rounded one stands for."""
    if precision == "float32":
        return weight
    if precision == "int8-dynamic":
        q, scale = round_rows(weight)
        return q * scale[:, None]
    bits = BITS[precision]
    integers, scales = round_blocks(weight, block_size_for(weight.shape[1]), bits)
    return ((integers.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]).reshape(weight.shape)


def rounded_model(tensors: Arrays, config: ModelConfig, precision: Precision) -> tuple[ModelConfig, Arrays]:
    """Return the float32 model whose linear layers hold what the graph's integers stand for.

    The graph looks tokens up in float32, so that a tied head becomes one of its own.

    Args:
      tensors: float32, by module name, matrices (O, I).
      config: shape.
      precision: of the graph.
    """
    found = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    for name, layer in linear_layers(config).items():
        found[f"{name}.weight"] = rounded(np.asarray(tensors[f"{layer.matrix}.weight"]), precision)
    return dataclasses.replace(config, tied=False), found
