"""Choosing the scale of static inputs, and smoothing vectors for both kinds, by the error they make.

A static scale must serve every token: a plain maximum wastes the integers on a few outliers. So the scale
is searched below the maximum, and a smoothing vector moves outliers from the input into the weights:

    smooth[i] = max|x[:, i]|^a / max|w[:, i]|^(1 - a)      x[:, i] / smooth[i],  w[:, i] * smooth[i]

for a in (0.25, 0.5, 0.75), or none. What is kept is what makes the layer's output error on calibration
tokens smallest, integers and all. A channel that is scaled up in the input and down in the weights gets a
vector scaled up as much, so that a smoothed layer is the same however a model spreads its outliers.

Source: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438 (there one fixed a for all layers).
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from jaxgpt_export.model.arithmetic import quantize_rows, quantize_static, quantize_tokens, scale_of
from jaxgpt_export.quantize.calibration import SMALLEST_FACTOR, LayerInput

STRENGTHS = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is tried for a layer's input.

    Attributes:
      covered: shares of the largest value to try for a static scale; none for a dynamic input.
      strengths: smoothing strengths to try, besides none.
    """

    covered: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ActivationQuant:
    """How a layer's input is quantized.

    Attributes:
      scale: (), of a static input; None for dynamic.
      smooth: (I,), or None.
      error: mean squared output error over mean squared output, on the sample.
    """

    scale: Float[Tensor, ""] | None
    smooth: Float[Tensor, "I"] | None
    error: float


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
def search_scale(layer: LayerInput, weight: Float[Tensor, "O I"], search: Search) -> ActivationQuant:
    """Choose scale and smoothing of a layer's input by the error of its output.

    Args:
      layer: what calibration saw.
      weight: (O, I), float.
      search: what is tried.

    Returns:
      The best of all combinations; none is preferred at equal error.
    """
    exact = layer.sample @ weight.t()
    power = float(exact.square().mean())
    best: ActivationQuant | None = None
    vectors = [None, *(smoothing_vector(layer.largest, weight, s) for s in search.strengths)]
    for smooth in vectors:
        x = layer.sample if smooth is None else layer.sample / smooth
        largest = layer.largest if smooth is None else layer.largest / smooth
        q, weight_scale = quantize_rows(weight if smooth is None else weight * smooth)
        rounded = q.float() * weight_scale[:, None]
        scales: list[Tensor | None] = [scale_of(largest.max() * share) for share in search.covered]
        for scale in scales or [None]:
            if scale is None:
                integers, used = quantize_tokens(x)
            else:
                integers, used = quantize_static(x, scale), scale
            error = float((integers * used @ rounded.t() - exact).square().mean()) / max(power, 1e-30)
            if best is None or error < best.error:
                best = ActivationQuant(scale, smooth, error)
    assert best is not None
    return best
