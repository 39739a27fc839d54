"""The arithmetic of the INT8 artifacts, written once.

Every executor (this PyTorch code, quantization-aware training in JAX, a native engine) computes this and
nothing else. All floats are IEEE float32, all operations single ones in the order written; no fused
multiply-add, no reciprocal in place of a division. `round` rounds halves to even.

    scale(m)        = max(m / 127, 2^-126)                      (2^-126: the smallest normal float32, so
                                                                a row of zeros divides by no zero)
    weight row o    s_w[o] = scale(max_i |w[o, i]|)
                    q_w[o, i] = round(w[o, i] / s_w[o])         in [-127, 127] without clipping
    smoothing       x[i] becomes x[i] / smooth[i] first, where the layer has such a vector; the weights
                    were multiplied by it before they were rounded
    dynamic input   per token t: s_x[t] = scale(max_i |x[t, i]|)
                    q_x[t, i] = round(x[t, i] / s_x[t])         in [-127, 127] without clipping
    static input    s_x is stored with the layer
                    q_x[t, i] = clip(round(x[t, i] / s_x), -127, 127)
    output          y[t, o] = float32(sum_i q_x[t, i] q_w[o, i]) * (s_x[t] * s_w[o]) + bias[o]
    embedding row   e[v, i] = float32(q_w[v, i]) * s_w[v], divided by smooth[i] where the head has one

The sum is exact in int32: |sum| <= 127^2 I < 2^31 for I < 133,144. -128 is never used, so that a product
fits 15 bits and negation is safe. Symmetric: float 0 is integer 0, no zero point is stored.

Why m / 127 never needs clipping: s >= m / 127 (1 - 2^-24), so |x| / s <= 127 (1 + 2^-23), which rounds
to 127.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127
MIN_SCALE = 2.0**-126
MAX_INPUT_FEATURES = (2**31 - 1) // LEVELS**2


def scale_of(largest: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the step that puts the largest absolute value on 127."""
    return (largest / LEVELS).clamp_min_(MIN_SCALE)


def quantize_rows(weight: Float[Tensor, "O I"]) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O"]]:
    """Round each output row of a weight matrix to signed 8-bit integers.

    Args:
      weight: (O, I), float32, finite.

    Returns:
      q: (O, I), integers in [-127, 127].
      scale: (O,), weight units an integer step; q * scale[:, None] is within scale / 2 of weight.

    Raises:
      ValueError: a row holds NaN or infinity; the message names the first such row.

    Source: Krishnamoorthi 2018, arXiv:1806.08342, uniform symmetric quantizer.
    """
    finite = torch.isfinite(weight).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"weight row {row} of {len(weight)} holds NaN or infinity; check the checkpoint before quantizing"
        )
    scale = scale_of(weight.abs().amax(dim=1))
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def quantize_tokens(x: Float[Tensor, "*N I"]) -> tuple[Float[Tensor, "*N I"], Float[Tensor, "*N 1"]]:
    """Round each token's activations with the token's own step (dynamic input).

    Returns:
      q: (..., I), integers in [-127, 127], in float32: what they are packed into is the kernel's business.
      scale: (..., 1), activation units an integer step.
    """
    scale = scale_of(x.abs().amax(dim=-1, keepdim=True))
    return (x / scale).round_(), scale


def quantize_static(x: Float[Tensor, "*N I"], scale: Float[Tensor, ""]) -> Float[Tensor, "*N I"]:
    """Round activations with a stored step to integers in float32; beyond 127 steps they are clipped."""
    return (x / scale).round_().clamp_(-LEVELS, LEVELS)
