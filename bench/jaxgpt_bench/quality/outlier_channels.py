"""A model whose channels are as unequal as large models', and every method on it; see outliers.py."""

from typing import Any

import torch
from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.model.build import Tensors
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.parity.quality import Quality, batches, measure_quality
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict
from jaxtyping import Float
from torch import Tensor

from jaxgpt.shared.architecture import PARTS, linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import Dataset

SHARE = 0.01
SMALLEST, LARGEST = 10.0, 100.0


def with_outliers(config: ModelConfig, tensors: Tensors, seed: int) -> Tensors:
    """Return the same function with channels that are up to 100 times the rest.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I); not changed.
      seed: which channels, and by how much.
    """
    new, C = dict(tensors), config.n_embd
    generator = torch.Generator().manual_seed(seed)

    def factors() -> Float[Tensor, "C"]:
        vector = torch.ones(C)
        chosen = torch.randperm(C, generator=generator)[: max(round(C * SHARE), 1)]
        exponent = torch.rand(len(chosen), generator=generator)
        vector[chosen] = SMALLEST * (LARGEST / SMALLEST) ** exponent
        vector[chosen[0]] = LARGEST
        return vector

    blocks = [layer for layer in linear_layers(config).values() if layer.block is not None]
    readers = [layer for layer in blocks if layer.norm is not None or layer.values is not None]
    # In each block the channels of both norms are drawn first.
    for layer in sorted(readers, key=lambda layer: (layer.block, layer.values is not None)):
        vector = factors()
        for part in PARTS:
            if layer.norm is not None:
                new[f"{layer.norm}.{part}"] = new[f"{layer.norm}.{part}"] * vector
            else:
                values = new[f"{layer.values}.{part}"].clone()
                values[-C:] *= vector[:, None] if part == "weight" else vector
                new[f"{layer.values}.{part}"] = values
        new[f"{layer.name}.weight"] = new[f"{layer.name}.weight"] / vector
    return new


def measured(artifact: Artifact, dataset: Dataset, tokens: int) -> dict[str, dict[str, Any]]:
    """Quantize a model by each method and measure all of them on validation text."""
    quantizer = Quantizer(artifact, dataset)
    made: dict[str, QuantizedStateDict] = {
        "dynamic": find_method("int8-dynamic").apply(quantizer),
        "static": find_method("int8-static").apply(quantizer),
        "naive": find_method("int8-static").apply_observer(quantizer, "min-max"),
    }
    models: dict[str, GPT] = {"float": quantizer.reference}
    models |= {name: each.model(artifact.config) for name, each in made.items()}
    T = artifact.config.block_size
    inputs, targets = dataset.val_windows(T)
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
