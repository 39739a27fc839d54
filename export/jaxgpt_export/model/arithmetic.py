"""The arithmetic of the quantized artifacts, written once.

Every executor (this PyTorch code, quantization-aware training in JAX, a native engine) computes this and
nothing else. All floats are IEEE float32 but where the last paragraph of the table says float64, all
operations single ones in the order written; no fused multiply-add, no reciprocal in place of a division.
`round` rounds halves to even.

    scale(m)        = max(m / 127, 2^-126)                      (2^-126: the smallest normal float32, so
                                                                a row of zeros divides by no zero)
    weight row o    s_w[o] = scale(max_i |w[o, i]|)
                    q_w[o, i] = round(w[o, i] / s_w[o])         in [-127, 127] without clipping; a
                    quantizer may choose a neighbouring integer (`jaxgpt_export.quantize.gptq`)
    smoothing       x[i] becomes x[i] / smooth[i] first, where the layer has such a vector; the weights
                    were multiplied by it before they were rounded
    dynamic input   per token t: s_x[t] = scale(max_i |x[t, i]|)
                    q_x[t, i] = round(x[t, i] / s_x[t])         in [-127, 127] without clipping
    static input    s_x is stored with the layer
                    q_x[t, i] = clip(round(x[t, i] / s_x), -127, 127)
    two levels      some layers round the residual of the first rounding too, in 256ths of its scale:
                    r[t, i] = x[t, i] - float32(q_x[t, i]) * s_x[t]
                    p_x[t, i] = clip(round(r[t, i] / s_x[t] * 256), -127, 127)
    output          y[t, o] = float32(sum_i q_x[t, i] q_w[o, i]) * (s_x[t] * s_w[o]) + bias[o]
                    with two levels the sum is float32(sum_i q_x q_w) + float32(sum_i p_x q_w) / 256
    4 bits, rounded input
                    w[o, i] = float32(q[o, i] f[o, i // G]) * s_w[o]: a group's factor f is a whole number in
                    [-127, 127], not 0, so that one sum of integers serves for a row whatever its order:
                    y[t, o] = float32(sum_i q_x[t, i] q[o, i] f[o, i // G]) * (s_x[t] * s_w[o]) + bias[o]
    embedding row   e[v, i] = float32(q_w[v, i]) * s_w[v], divided by smooth[i] where the head has one

    weight-only     the input stays float: y[t, o] = sum_i x[t, i] w[o, i] + bias[o], float32, in any order
        16 bits     w[o, i] is float16, taken as float32; nothing is rounded further
        8 bits      w[o, i] = float32(q_w[o, i]) * s_w[o], rounded as above
        4 bits      w[o, i] = float32(q[o, i]) * s[o, i // G]: G input channels share a scale. q lies in
                    [-8, 7] and s is bfloat16 with a sign, so that a group's extreme of either sign can be -8
        byte        (q[o, 2 k] + 8) + 16 (q[o, 2 k + 1] + 8)

    the rest        LayerNorm, GELU (tanh) and attention (scores, softmax, mixture) are computed in float64
                    from their float32 inputs, in any order, and their results rounded to float32, once each.
                    So two executors have the same floats, but where a result lies between two of them to
                    14 digits (and in GELU's tail below -5, too small to turn an integer), and round to the
                    same integers: float32 sums in another order differ in their last bits, some of these
                    turn an integer, and each layer turns more. Weight-only models have no integers to turn
                    and need not. The residual stream and rotary turns are float32 operations in the order
                    written. (Training in JAX, which only learns to live with the rounding, keeps float32
                    throughout.)

Which integers and scales 4 bits have is the quantizer's business altogether. The integer sum is exact in
int32: |sum| <= 127^2 I < 2^31 for I < 133,144; with 4 bits and factors 8 times as much, for I <= 16,640.
-128 is never used, so that a product fits 15 bits and negation is safe. Symmetric: float 0 is integer 0, no
zero point is stored.

Why m / 127 never needs clipping: s >= m / 127 (1 - 2^-24), so |x| / s <= 127 (1 + 2^-23), which rounds
to 127.
"""

import torch
from jaxtyping import BFloat16, Float, Int8, Int16, UInt8
from torch import Tensor

LEVELS = 127
MIN_SCALE = 2.0**-126
RESIDUAL_LEVELS = 256
INT4_LOWEST, INT4_HIGHEST = -8, 7


def scale_of(largest: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the scale that puts the largest absolute value on 127."""
    return (largest / LEVELS).clamp_min_(MIN_SCALE)


def quantize_rows(weight: Float[Tensor, "O I"]) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O"]]:
    """Round each output row of a weight matrix to signed 8-bit integers.

    Args:
      weight: (O, I), float32, finite.

    Returns:
      q: (O, I), integers in [-127, 127].
      scale: (O,), weight units an integer; q * scale[:, None] is within scale / 2 of weight.

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
    """Round each token's activations with the token's own scale (dynamic input).

    Returns:
      q: (..., I), integers in [-127, 127], in float32: what they are packed into is the kernel's business.
      scale: (..., 1), activation units an integer.
    """
    scale = scale_of(x.abs().amax(dim=-1, keepdim=True))
    return (x / scale).round_(), scale


def quantize_static(x: Float[Tensor, "*N I"], scale: Float[Tensor, ""]) -> Float[Tensor, "*N I"]:
    """Round activations with a stored scale to integers in float32; beyond 127 of it they are clipped."""
    return (x / scale).round_().clamp_(-LEVELS, LEVELS)


def quantize_residual(
    x: Float[Tensor, "*N I"], q: Float[Tensor, "*N I"], scale: Float[Tensor, "..."]
) -> Float[Tensor, "*N I"]:
    """Round the residual of a first rounding to integers in [-127, 127], 256ths of its scale (two levels)."""
    residual = x - q * scale
    return (residual / scale).mul_(RESIDUAL_LEVELS).round_().clamp_(-LEVELS, LEVELS)


def int4_scale(extreme: Float[Tensor, "*N"]) -> BFloat16[Tensor, "*N"]:
    """Return the scale that puts a value, usually a group's largest in size, on -8."""
    scale = (extreme / INT4_LOWEST).to(torch.bfloat16)
    tiny = torch.full_like(scale, MIN_SCALE)
    return torch.where(scale.abs() >= MIN_SCALE, scale, tiny)


def round_int4(weight: Float[Tensor, "*N"], scale: Float[Tensor, "*N"]) -> Int8[Tensor, "*N"]:
    """Round weights with scales of the same shape to integers in [-8, 7]; what lies beyond is clipped."""
    return torch.round(weight / scale.float()).clamp_(INT4_LOWEST, INT4_HIGHEST).to(torch.int8)


def pack_int4(q: Int8[Tensor, "O I"]) -> UInt8[Tensor, "O I2"]:
    """Put two integers in [-8, 7] into a byte, the even channel into its low nibble."""
    unsigned = (q - INT4_LOWEST).to(torch.uint8)
    return unsigned[:, ::2] + unsigned[:, 1::2] * 16


def unpack_int4(packed: UInt8[Tensor, "*N I2"]) -> Int8[Tensor, "*N I"]:
    """Return the integers of bytes; the inverse of pack_int4."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(-2).to(torch.int8) + INT4_LOWEST


def integer_weights(
    packed: UInt8[Tensor, "*N I2"], factor: Int8[Tensor, "*N groups"]
) -> Int16[Tensor, "*N I"]:
    """Return 4-bit integers times the factors of their groups, in [-1016, 1016]."""
    q = unpack_int4(packed).to(torch.int16)
    return (q.unflatten(-1, (factor.shape[-1], -1)) * factor[..., None]).flatten(-2)


def dequantize(weight: Tensor, scale: Tensor, factor: Tensor | None = None) -> Float[Tensor, "*N I"]:
    """Return the float32 weights that rows of integers stand for.

    Args:
      weight: (..., I) int8, or (..., I / 2) uint8 with 4-bit integers.
      scale: (...) float32 for 8 bits and where there are factors, else (..., I / G) bfloat16.
      factor: (..., I / G) int8, of groups of 4-bit integers; None for none.
    """
    if factor is not None:
        return integer_weights(weight, factor).float() * scale[..., None]
    if weight.dtype == torch.int8:
        return weight.float() * scale[..., None]
    q = unpack_int4(weight).float()
    return (q.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)
