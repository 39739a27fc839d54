"""Choosing a method by what it costs: the cheapest within a bound, which layers it hurts, and its speed here.

Cheapest means fewest bytes of weights a token, and of two with as many, less work a token.
"""

from collections.abc import Callable
from typing import Any

from jaxgpt.shared.architecture import matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say

from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.parity.quality import Quality
from jaxgpt_export.quantize.methods import Method, all_methods
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.sensitivity import worst_layers
from jaxgpt_export.quantize.speed import speed_figures, try_speed
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

# Where no method is within the bound, the worst of so many layers stays in higher precision.
LAYERS_FOR_ONE_IN_HIGH_PRECISION = 10
# Measures a model on validation text: (of the float model, of the quantized one)
Measure = Callable[[GPT], tuple[Quality, Quality]]


def cheapest_first(quantizer: Quantizer) -> list[Method]:
    """Return the methods that can be applied, from the cheapest on."""
    found = [
        method
        for method in all_methods().values()
        if method.chosen_by_auto and method.obstacle(quantizer.artifact) is None
    ]
    return sorted(found, key=lambda method: method.cost(quantizer.config))


def choose(
    quantizer: Quantizer, measure: Measure, max_loss: float
) -> tuple[QuantizedStateDict | None, list[dict[str, Any]]]:
    """Try methods from the cheapest on; keep the first whose validation loss rises by no more than a bound.

    When none is within it, each is tried again with its worst layers (one in ten) in higher precision.

    Returns:
      What was rounded, or None, and a row for everything that was tried.
    """
    methods = cheapest_first(quantizer)
    rows: list[dict[str, Any]] = []
    plain: dict[str, QuantizedStateDict] = {}
    for keeps in (False, True):
        for method in methods:
            say(f"trying {method.name}{', its costliest layers in higher precision' if keeps else ''}")
            if keeps:
                count = -(-len(matrices(quantizer.config)) // LAYERS_FOR_ONE_IN_HIGH_PRECISION)
                worst = worst_layers(quantizer, method, plain[method.name], count)
                candidate = method.apply(quantizer, worst)
            else:
                candidate = plain[method.name] = method.apply(quantizer)
            rows.append(table_row(quantizer, method, candidate, measure))
            if rows[-1]["loss_increase"] <= max_loss:
                return candidate, rows
    return None, rows


def table_row(
    quantizer: Quantizer, method: Method, candidate: QuantizedStateDict, measure: Measure
) -> dict[str, Any]:
    """Return what a table of methods shows of one; without its speed where that could not be measured."""
    model = candidate.model(quantizer.config)
    before, after = measure(model)
    assert after.parity is not None
    return {
        "method": method.name,
        "kept": high_precision_layers(quantizer.config, method, candidate),
        "loss_increase": after.loss - before.loss,
        "kl_mean": after.parity.kl_mean,
        "top1_agreement": after.parity.top1_agreement,
        "size_mb": candidate.tensor_bytes / 1e6,
        **speed_figures(try_speed(quantizer, candidate, model)),
    }


def high_precision_layers(config: ModelConfig, method: Method, candidate: QuantizedStateDict) -> list[str]:
    """Return the matrices that stayed in higher precision."""
    usual, layers = method.schemes(config), candidate.quantization.layers
    return [name for name in matrices(config) if layers[name].weight_bits > usual[name].weight_bits]
