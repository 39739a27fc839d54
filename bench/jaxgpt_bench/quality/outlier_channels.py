"""A model whose channels are as unequal as large models', and every method on it; see outliers.py."""

from typing import Any

import torch
from jaxgpt_export.format.artifact import Artifact, Tensors
from jaxgpt_export.model.gpt import GPT, PARTS
from jaxgpt_export.parity.quality import Quality, batches, measure_quality
from jaxgpt_export.quantize.quantizer import Quantizer, Rounding
from jaxtyping import Float
from torch import Tensor

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import Dataset, windows

SHARE = 0.01
SMALLEST, LARGEST = 10.0, 100.0


def with_outliers(config: ModelConfig, tensors: Tensors, seed: int) -> Tensors:
    """Return the same function with channels that are up to 100 times the rest.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I); not changed.
      seed: which channels, and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    new, C = dict(tensors), config.n_embd

    def factors() -> Float[Tensor, "C"]:
        vector = torch.ones(C)
        chosen = torch.randperm(C, generator=generator)[: max(round(C * SHARE), 1)]
        exponent = torch.rand(len(chosen), generator=generator)
        vector[chosen] = SMALLEST * (LARGEST / SMALLEST) ** exponent
        vector[chosen[0]] = LARGEST
        return vector

    for index in range(config.n_layer):
        block = f"h.{index}"
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            vector = factors()
            for part in PARTS:
                new[f"{block}.{norm}.{part}"] = new[f"{block}.{norm}.{part}"] * vector
            new[f"{block}.{reader}.weight"] = new[f"{block}.{reader}.weight"] / vector
        vector = factors()
        for part in PARTS:
            values = new[f"{block}.attn.c_attn.{part}"].clone()
            values[2 * C :] *= vector[:, None] if part == "weight" else vector
            new[f"{block}.attn.c_attn.{part}"] = values
        new[f"{block}.attn.c_proj.weight"] = new[f"{block}.attn.c_proj.weight"] / vector
    return new


def measured(artifact: Artifact, dataset: Dataset, tokens: int) -> dict[str, dict[str, Any]]:
    """Quantize a model by each method and measure all of them on validation text."""
    quantizer = Quantizer(artifact, dataset)
    made: dict[str, Rounding] = {method: quantizer.round(method) for method in ("dynamic", "static")}
    made["naive"] = quantizer.observed("static", "min-max")
    models: dict[str, GPT] = {"float": quantizer.reference}
    models |= {name: each.model(artifact.config) for name, each in made.items()}
    T = artifact.config.block_size
    inputs, targets = windows(dataset.val, T)
    rows = max(-(-tokens // T), 1)
    found: dict[str, Quality] = measure_quality(dict(models), batches(inputs[:rows], targets[:rows], rows=8))
    result = {}
    for name, quality in found.items():
        parity = quality.parity
        result[name] = {
            "loss": quality.loss,
            "tokens": quality.tokens,
            "loss_increase": quality.loss - found["float"].loss,
            "kl_mean": 0.0 if parity is None else parity.kl_mean,
            "observer": made[name].figures.get("calibration", {}).get("observer") if name in made else None,
        }
    return result
