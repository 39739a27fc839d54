"""A run's parameters as the tensors of an artifact."""

import numpy as np
import torch
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.huggingface import hf_name
from jaxgpt.training.model.fake_quant import INPUT_SCALE
from jaxgpt.training.model.params import Params, abstract_params

from jaxgpt_export.format.artifact import Tensors


def hf_tensors(params: Params, config: ModelConfig) -> Tensors:
    """Copy Flax parameters into tensors of a Hugging Face GPT-2 file.

    Args:
      params: flat, under GPT-2's names, without input steps.
      config: shape, qat off.

    Raises:
      UserError: names every missing and unexpected parameter.
    """
    expected = abstract_params(config)
    missing, extra = sorted(expected.keys() - params.keys()), sorted(params.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"the checkpoint's parameters do not fit its config: missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    return {hf_name(name): torch.from_numpy(np.array(array, np.float32)) for name, array in params.items()}


def input_scales(params: Params) -> Tensors:
    """Return the input steps of a quantization-aware training: "h.0.attn.c_attn.input_scale", ..."""
    return {
        name: torch.from_numpy(np.array(array, np.float32))
        for name, array in params.items()
        if name.endswith(INPUT_SCALE)
    }
