"""Choosing the step of static inputs, and smoothing vectors for both kinds, by the error they make.

A static step must serve every token: a plain maximum wastes the integers on a few outliers. So the step
is searched below the maximum, and a smoothing vector moves outliers from the input into the weights:

    smooth[i] = max|x[:, i]|^a / max|w[:, i]|^(1 - a)      x[:, i] / smooth[i],  w[:, i] * smooth[i]

for a in (0.25, 0.5, 0.75), or none. What is kept is what makes the layer's output error on calibration
tokens smallest, integers and all. A channel that is scaled up in the input and down in the weights gets a
vector scaled up as much, so that a smoothed layer is the same however a model spreads its outliers.

Source: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438 (there one fixed a for all layers).
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Int32
from torch import Tensor, nn

from export.arithmetic import quantize_rows, quantize_static, quantize_tokens, scale_of
from export.model import GPT

STRENGTHS = (0.25, 0.5, 0.75)
# Shares of the largest value that a step may cover; below 0.3 no layer of any tried model had its best.
COVERED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEARCH_ROWS = 512  # tokens on which errors are compared
OUTLIER_ROWS = 64  # of them those with the largest values: rare tokens carry the largest activations
SMALLEST_FACTOR = 1e-5


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """What calibration saw at a layer's input.

    Attributes:
      largest: (I,), largest |x| of each channel over all tokens.
      sample: (N, I), inputs of some tokens, the largest among them.
      moments: (I, I), sum of x x^T over all tokens, up to a factor.
    """

    largest: Float[Tensor, "I"]
    sample: Float[Tensor, "N I"]
    moments: Float[Tensor, "I I"]


@dataclasses.dataclass(frozen=True)
class InputPlan:
    """How a layer's input is quantized.

    Attributes:
      scale: (), the static step; None for dynamic.
      smooth: (I,), or None.
      error: mean squared output error over mean squared output, on the sample.
    """

    scale: Float[Tensor, ""] | None
    smooth: Float[Tensor, "I"] | None
    error: float


@torch.inference_mode()
def collect_inputs(model: GPT, tokens: Int32[Tensor, "B T"]) -> dict[str, LayerInput]:
    """Run the float model and keep what enters each linear layer.

    Args:
      model: float32.
      tokens: calibration text.

    Raises:
      UserError: an activation is NaN or infinite; the message names the layer.
    """
    largest: dict[str, Tensor] = {}
    samples: dict[str, list[Tensor]] = {}
    moments: dict[str, Tensor] = {}
    units: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    per_row = max(SEARCH_ROWS // len(tokens), 1)

    def keep(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        sizes = flat.abs().amax(dim=1)
        if not bool(torch.isfinite(sizes).all()):
            raise UserError(f"calibration: the input of {name} holds NaN or infinity; check the checkpoint")
        channels = flat.abs().amax(dim=0)
        largest[name] = torch.maximum(largest[name], channels) if name in largest else channels
        if name not in units:
            units[name] = sizes.max().clamp_min(SMALLEST_FACTOR)  # or the squares of large inputs overflow
        scaled = flat / units[name]
        product = scaled.t() @ scaled
        moments[name] = moments[name] + product if name in moments else product
        top = sizes.topk(min(max(OUTLIER_ROWS // len(tokens), 1), len(flat))).indices
        random = torch.randperm(len(flat), generator=generator)[:per_row]
        samples.setdefault(name, []).append(flat[torch.cat([top, random])])

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
            )
    try:
        for row in tokens:
            model(row[None].long())
    finally:
        for handle in handles:
            handle.remove()
    return {name: LayerInput(largest[name], torch.cat(samples[name]), moments[name]) for name in largest}


def smoothing_vector(
    largest: Float[Tensor, "I"], weight: Float[Tensor, "O I"], strength: float
) -> Float[Tensor, "I"]:
    """Return the smoothing vector of a strength, with geometric mean 1.

    A channel that is always zero keeps a moderate factor.
    """
    inputs = largest.clamp_min(SMALLEST_FACTOR)
    weights = weight.abs().amax(dim=0).clamp_min(SMALLEST_FACTOR)
    log = strength * inputs.log() - (1 - strength) * weights.log()
    return (log - log.mean()).exp().clamp(SMALLEST_FACTOR, 1 / SMALLEST_FACTOR)


@torch.inference_mode()
def plan_input(
    layer: LayerInput,
    weight: Float[Tensor, "O I"],
    covered: Sequence[float] = COVERED,
    strengths: Sequence[float] = STRENGTHS,
) -> InputPlan:
    """Choose step and smoothing of a layer's input by the error of its output.

    Args:
      layer: what calibration saw.
      weight: (O, I), float.
      covered: shares of the largest value to try for a static step; none for a dynamic input.
      strengths: smoothing strengths to try, besides none.

    Returns:
      The best of all combinations; none is preferred at equal error.
    """
    exact = layer.sample @ weight.t()
    power = float(exact.square().mean())
    best: InputPlan | None = None
    vectors = [None, *(smoothing_vector(layer.largest, weight, s) for s in strengths)]
    for smooth in vectors:
        x = layer.sample if smooth is None else layer.sample / smooth
        largest = layer.largest if smooth is None else layer.largest / smooth
        q, weight_scale = quantize_rows(weight if smooth is None else weight * smooth)
        rounded = q.float() * weight_scale[:, None]
        scales: list[Tensor | None] = [scale_of(largest.max() * share) for share in covered]
        for scale in scales or [None]:
            if scale is None:
                integers, step = quantize_tokens(x)
            else:
                integers, step = quantize_static(x, scale), scale
            error = float((integers * step @ rounded.t() - exact).square().mean()) / max(power, 1e-30)
            if best is None or error < best.error:
                best = InputPlan(scale, smooth, error)
    assert best is not None
    return best
