"""Rounding weights so that their errors make up for each other: GPTQ, for 4 bits in groups and for 8 bits.

Rounding a column of a weight matrix leaves an error in the layer's output; the columns that are not rounded
yet are changed so that, on calibration inputs, they take back as much of it as they can:

    H = sum x x^T + 0.01 mean(diag H) I        inputs x of the layer
    U^T U = H^-1                               U upper triangular
    for each column i:   e = (w[:, i] - rounded(w[:, i])) / U[i, i];   w[:, j] -= e U[i, j] for j > i

A scale of 8 bits is that of the whole row, as if it were rounded to nearest. A group's scale of 4 bits is
chosen when its first column is reached, on the weights as they are by then: among scales that put the group's
extreme on -8 or 7, or clip it a little, the one of least squared error, each channel weighted by its entry of
diag H.

Source: Frantar et al. 2023, GPTQ, arXiv:2210.17323 (algorithm 1; there without the choice of scales).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Int8
from torch import Tensor

from jaxgpt_export.model.arithmetic import INT4_HIGHEST, INT4_LOWEST, LEVELS, int4_scale, round_int4, scale_of

DAMPINGS = (0.01, 0.1, 1.0)  # the first for which the inverse exists in float64
ROW_BLOCK = 64  # columns after which the rest of a row is changed
# Shares of a group's extreme that the integers may cover.
GROUP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Rounded(NamedTuple):
    """A matrix of 4 bits.

    Attributes:
      q: (O, I) integers in [-8, 7].
      scale: (O, I / G) bfloat16, of groups; or (O,) float32 where groups have factors.
      factor: (O, I / G) int8, by which a group's integers count; None where it has a scale.
    """

    q: Tensor
    scale: Tensor
    factor: Tensor | None = None


def round_groups(weight: Float[Tensor, "O I"], group_size: int, factors: bool = False) -> Rounded:
    """Round to nearest, each group with the scale that puts its extreme on -8: what GPTQ is compared with.

    Args:
      weight: (O, I), float32.
      group_size: G, divides I.
      factors: groups get whole factors of their row's scale, in place of scales.
    """
    grouped = weight.unflatten(1, (-1, group_size))
    scale = int4_scale(_extreme(grouped))
    if not factors:
        q = round_int4(grouped, scale[..., None].expand_as(grouped))
        return Rounded(q.flatten(1), scale)
    of_row = row_scale(scale)
    factor = nearest_factor(scale, of_row[:, None])
    steps = (factor * of_row[:, None])[..., None].expand_as(grouped)
    return Rounded(round_int4(grouped, steps).flatten(1), of_row, factor.to(torch.int8))


def row_scale(scales: Float[Tensor, "O groups"]) -> Float[Tensor, "O"]:
    """Return the scale of each row, of which its groups' scales become whole multiples up to 127."""
    return scale_of(scales.float().abs().amax(dim=1))


def nearest_factor(scale: Tensor, of_row: Tensor) -> Tensor:
    """Return the whole factor in [-127, 127] nearest to scale / of_row, 1 or -1 in place of 0; as float32."""
    scale = scale.float()
    factor = torch.round(scale / of_row).clamp_(-LEVELS, LEVELS)
    return torch.where(factor == 0, torch.where(scale < 0, -1.0, 1.0), factor)


def _extreme(groups: Float[Tensor, "*N G"]) -> Float[Tensor, "*N"]:
    """Return the value of largest size of each group, with its sign."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)


def best_scale(
    weight: Float[Tensor, "O G"], importance: Float[Tensor, "G"], of_row: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "O"]:
    """Return the scale of each row's group that makes the weighted squared rounding error smallest.

    Args:
      weight: (O, G), a group's columns.
      importance: (G,), of each column's error.
      of_row: (O,), of which the scales must be whole multiples, float32 then; None: any bfloat16.
    """
    extreme = _extreme(weight)
    onto_highest = extreme * (INT4_LOWEST / INT4_HIGHEST)  # int4_scale divides by the lowest
    scales = torch.stack(
        [int4_scale(value * share) for value in (extreme, onto_highest) for share in GROUP_SHARES]
    )
    if of_row is not None:
        scales = nearest_factor(scales, of_row) * of_row
    wide = scales[:, :, None].expand(-1, *weight.shape)
    error = (round_int4(weight.expand_as(wide), wide) * wide.float() - weight).square() @ importance
    return scales.gather(0, error.argmin(0, keepdim=True))[0]


@torch.inference_mode()
def gptq(
    weight: Float[Tensor, "O I"], moments: Float[Tensor, "I I"], group_size: int, factors: bool = False
) -> Rounded:
    """Round a matrix to 4 bits so that the layer's output changes least.

    Args:
      weight: (O, I), float32.
      moments: sum of x x^T over calibration inputs.
      group_size: G, divides I.
      factors: groups get whole factors of their row's scale, in place of scales.
    """
    of_row = row_scale(round_groups(weight, group_size).scale) if factors else None
    scales: list[Tensor] = []

    def scale_of_group(block: Tensor, importance: Tensor) -> Tensor:
        scales.append(best_scale(block, importance, of_row))
        return scales[-1]

    q = _gptq_columns(weight, moments, group_size, scale_of_group, round_int4)
    chosen = torch.stack(scales, dim=1)
    if of_row is None:
        return Rounded(q, chosen)
    return Rounded(q, of_row, torch.round(chosen / of_row[:, None]).to(torch.int8))


@torch.inference_mode()
def gptq_rows(
    weight: Float[Tensor, "O I"], moments: Float[Tensor, "I I"]
) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O"]]:
    """Round a matrix to 8 bits, a scale a row, so that the layer's output changes least.

    Returns:
      Integers in [-127, 127] and the scales that `arithmetic.quantize_rows` gives too.
    """
    scale = scale_of(weight.abs().amax(dim=1))

    def round_column(column: Tensor, scale: Tensor) -> Tensor:
        return torch.round(column / scale).clamp_(-LEVELS, LEVELS).to(torch.int8)

    return _gptq_columns(weight, moments, ROW_BLOCK, lambda block, importance: scale, round_column), scale


def _gptq_columns(
    weight: Float[Tensor, "O I"],
    moments: Float[Tensor, "I I"],
    block: int,
    scale_of_block: Callable[[Tensor, Tensor], Tensor],
    round_column: Callable[[Tensor, Tensor], Tensor],
) -> Int8[Tensor, "O I"]:
    """Round column by column; later blocks are changed once a block.

    Args:
      weight: (O, I), float32.
      moments: sum of x x^T over calibration inputs.
      block: columns after which the rest is changed; for 4 bits those that share a scale.
      scale_of_block: gives the scale (O,) for a block's columns and their weights in the error.
      round_column: gives the integers (O,) of a column.
    """
    weight, moments = weight.clone(), moments.double()
    diagonal = moments.diagonal()
    silent = diagonal == 0  # channels that calibration never saw: nothing to make up for
    mean = diagonal.mean().clamp_min(1e-30)
    upper = None
    for damping in DAMPINGS:
        damped = moments + torch.diag(damping * mean + silent.double() * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(factor)
        candidate, also = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and not also and bool(torch.isfinite(candidate.float()).all()):
            upper = candidate.float()
            break
    if upper is None:
        raise UserError(
            "calibration: a layer's inputs are too uneven to round its weights; check the checkpoint"
        )
    importance = diagonal.float() / diagonal.max().clamp_min(1e-30).float() + 1e-6
    integers = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        scale = scale_of_block(weight[:, start:end], importance[start:end])
        errors = torch.empty(len(weight), end - start)
        for i in range(start, end):
            q = round_column(weight[:, i], scale)
            errors[:, i - start] = (weight[:, i] - q * scale.float()) / upper[i, i]
            weight[:, i + 1 : end] -= errors[:, i - start, None] * upper[i, None, i + 1 : end]
            integers[:, i] = q
        weight[:, end:] -= errors @ upper[start:end, end:]
    return integers
