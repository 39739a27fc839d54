"""Choosing a method by what it costs: the cheapest within a bound, which layers it hurts, and its speed here.

Cheapest means fewest bytes of weights a token, and of two with as many, less work a token.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import FOUR_BIT_METHODS, usual_bits
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.parity.quality import Quality
from jaxgpt_export.quantize.quantizer import Quantizer, Rounding
from jaxgpt_export.quantize.sensitivity import worst_layers

CHEAPEST_FIRST = (*FOUR_BIT_METHODS, "static-qat", "static", "dynamic", "weight-only-int8")
KEPT_SHARE = 10  # where no method is within the bound, the worst layer in so many stays in higher precision
SPEED_TOKENS = 16
SPEED_ROUNDS = 5
# Measures a model on validation text: (of the float model, of the quantized one)
Measure = Callable[[GPT], tuple[Quality, Quality]]


def choose(
    quantizer: Quantizer, measure: Measure, max_loss: float
) -> tuple[Rounding | None, list[dict[str, Any]]]:
    """Try methods from the cheapest on; keep the first whose validation loss rises by no more than a bound.

    When none is within it, each is tried again with its worst layers (one in ten) in higher precision.

    Returns:
      The rounding, or None, and a row for everything that was tried.
    """
    methods = [m for m in CHEAPEST_FIRST if (m == "static-qat") <= bool(quantizer.artifact.input_scales)]
    methods = [m for m in methods if m != "static" or not quantizer.artifact.input_scales]
    methods = [m for m in methods if m not in FOUR_BIT_METHODS or quantizer.config.n_embd % 2 == 0]
    rows: list[dict[str, Any]] = []
    plain: dict[str, Rounding] = {}
    for keeps in (False, True):
        for method in methods:
            if keeps:
                count = -(-len(plain[method].quantization.bits) // KEPT_SHARE)
                made = quantizer.round(method, worst_layers(quantizer, plain[method], count))
            else:
                made = plain[method] = quantizer.round(method)
            rows.append(table_row(quantizer, made, measure))
            if rows[-1]["loss_increase"] <= max_loss:
                return made, rows
    return None, rows


def table_row(quantizer: Quantizer, made: Rounding, measure: Measure) -> dict[str, Any]:
    """Return what a table of methods shows of one."""
    model = made.model(quantizer.config)
    before, after = measure(model)
    assert after.parity is not None
    return {
        "method": made.quantization.method,
        "kept": kept_layers(quantizer.config, made),
        "loss_increase": after.loss - before.loss,
        "kl_mean": after.parity.kl_mean,
        "top1_agreement": after.parity.top1_agreement,
        "size_mb": made.tensor_bytes / 1e6,
        "speed_against_float": speed_against_float(quantizer.reference, model),
    }


def kept_layers(config: ModelConfig, made: Rounding) -> list[str]:
    """Return the layers that stayed in higher precision."""
    usual = usual_bits(config, made.quantization.method)
    return [name for name, bits in made.quantization.bits.items() if bits > usual[name]]


@torch.inference_mode()
def speed_against_float(reference: GPT, model: GPT) -> float:
    """Return a model's tokens/s over the float one's: short trials, interleaved, one text."""
    ratios = []
    for _ in range(SPEED_ROUNDS):
        seconds = [_decode_seconds(each) for each in (reference, model)]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first prepares


def _decode_seconds(model: GPT) -> float:
    cache = model.new_cache()
    count = min(SPEED_TOKENS, model.config.block_size)
    started = time.perf_counter()
    for token in range(count):
        model(torch.tensor([[token % model.config.vocab_size]]), cache)
    return time.perf_counter() - started
