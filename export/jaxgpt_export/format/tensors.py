"""Which tensors an artifact holds, and whether those that were read are they.

    float32   Hugging Face's names and layouts: transformer.h.0.attn.c_attn.weight (I, O), ...
    quantized NAME.weight          (O, I) int8       8 bits; float16; float32 where the layer was left alone
              NAME.weight_packed   (O, I / 2) uint8  4 bits, two weights a byte
              NAME.weight_scale    (O,) float32      8 bits; (O, I / group_size) bfloat16 for 4, or
                                                     (O,) float32 where the input is rounded, and then
              NAME.group_factor    (O, I / group_size) int8
              NAME.input_scale     () float32        static input; also lm_head.input_scale
              NAME.smooth          (I,) float32      by which the input is divided (wte: by which rows are)
              NAME.bias, ln_*      float32

NAME is wte, wpe, lm_head (where the head is not tied) or one of the matrices of a block. A tied head has no
tensor but its input_scale: it is wte.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxgpt.shared.architecture import PARTS, linear_layers, matrices, norms, parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tensor_file import BFLOAT16, Array, Arrays, dtype_name, read_tensor_file

from jaxgpt_export.format.scheme import Quantization, has_factors

Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

FLOAT32_DTYPE = np.dtype(np.float32)
MOST_NAMES = 12  # of tensors in a message: those of a block


def expected_tensors(config: ModelConfig, quantization: Quantization | None) -> Shapes:
    """Return dtype and shape of every tensor that model.safetensors must hold, by its name there."""
    if quantization is None:
        return {each.hf_name: (FLOAT32_DTYPE, each.hf_shape) for each in parameters(config)}
    expected: Shapes = {}
    for name in norms(config):
        for part in PARTS:
            expected[f"{name}.{part}"] = (FLOAT32_DTYPE, (config.n_embd,))
    for name, layer in matrices(config).items():
        scheme, O, I = quantization.layers[name], layer.outputs, layer.inputs
        if layer.bias:
            expected[f"{name}.bias"] = (FLOAT32_DTYPE, (O,))
        if scheme.weight_bits == 32:
            expected[f"{name}.weight"] = (FLOAT32_DTYPE, (O, I))
        elif scheme.weight_bits == 16:
            expected[f"{name}.weight"] = (np.dtype(np.float16), (O, I))
        elif scheme.weight_bits == 8:
            expected[f"{name}.weight"] = (np.dtype(np.int8), (O, I))
            expected[f"{name}.weight_scale"] = (FLOAT32_DTYPE, (O,))
        else:
            expected[f"{name}.weight_packed"] = (np.dtype(np.uint8), (O, I // 2))
            groups = (O, I // scheme.group_size)
            if has_factors(name, quantization.layers, config):
                expected[f"{name}.weight_scale"] = (FLOAT32_DTYPE, (O,))
                expected[f"{name}.group_factor"] = (np.dtype(np.int8), groups)
            else:
                expected[f"{name}.weight_scale"] = (BFLOAT16, groups)
        if scheme.smoothing:
            expected[f"{name}.smooth"] = (FLOAT32_DTYPE, (I,))
    for name in linear_layers(config):
        if quantization.layers[name].activation == "static":
            expected[f"{name}.input_scale"] = (FLOAT32_DTYPE, ())
    return expected


def check_tensors(tensors: Mapping[str, Array], expected: Shapes, where: Path) -> None:
    """Compare tensors with what is expected.

    Raises:
      UserError: names missing and extra tensors, a few where there are many, else the first of wrong dtype or
        shape or with NaN or infinity.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{where}: missing tensors: {_some(missing)}; "
            f"unexpected tensors: {_some(extra)}; it does not fit its config.json"
        )
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise UserError(
                f"{where}: {name} is {dtype_name(tensor.dtype)} {tensor.shape}, "
                f"expected {dtype_name(dtype)} {shape}"
            )
        _check_values(tensor, name, where)


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "") or "none"


def _check_values(tensor: Array, name: str, where: Path) -> None:
    """Raise UserError for numbers that no artifact has."""
    if not _is_finite(tensor):
        raise UserError(f"{where}: {name} holds NaN or infinity; the file or its training is damaged")
    if tensor.dtype == np.int8 and tensor.size and int(tensor.min()) == -128:
        raise UserError(f"{where}: {name} holds -128, which no artifact has; the file is damaged")
    if name.endswith(".group_factor") and not tensor.all():
        raise UserError(f"{where}: {name} holds a factor of 0, which no artifact has; the file is damaged")
    if name.endswith(("_scale", ".smooth")) and not _are_scales(tensor):
        which = "of 0" if tensor.dtype == BFLOAT16 else "that is not positive"
        raise UserError(f"{where}: {name} holds a scale {which}; the file is damaged")


def _is_finite(tensor: Array) -> bool:
    if tensor.dtype == BFLOAT16:
        return bool(((tensor["bfloat16"] & 0x7F80) != 0x7F80).all())  # all exponent bits: infinity or NaN
    return tensor.dtype.kind != "f" or bool(np.isfinite(tensor).all())


def _are_scales(tensor: Array) -> bool:
    if tensor.dtype == BFLOAT16:  # of 4-bit weights, with a sign
        return bool((tensor["bfloat16"] & 0x7FFF).all())
    return bool((tensor > 0).all())


def read_tensors(path: Path) -> Arrays:
    """Read a .safetensors file; UserError when it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} is missing; convert or quantize again")
    try:
        return read_tensor_file(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}); it was truncated or altered"
        ) from None


def to_hf_layout(tensors: Mapping[str, Array], config: ModelConfig) -> Arrays:
    """Return float32 tensors of a module, by their names and layouts in a Hugging Face file."""
    return {
        each.hf_name: tensors[each.name].T if each.transposed else tensors[each.name]
        for each in parameters(config)
    }


def from_hf_layout(tensors: Mapping[str, Array], config: ModelConfig) -> Arrays:
    """Return tensors of a Hugging Face file by their names in the module, matrices (O, I)."""
    return {
        each.name: np.ascontiguousarray(tensors[each.hf_name].T) if each.transposed else tensors[each.hf_name]
        for each in parameters(config)
    }
