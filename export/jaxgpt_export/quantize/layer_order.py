"""Rounding layer after layer, each on the inputs that rounded ones made."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from jaxgpt.shared.architecture import BLOCK_LINEARS, HEAD, linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Float64, Int32
from torch import Tensor, nn

from jaxgpt_export.model.build import float_model
from jaxgpt_export.model.gpt import GPT, Block

# Takes a layer's name, weight and the second moments of its inputs; returns the weights to go on with.
RoundLayer = Callable[[str, Tensor, Tensor], Tensor]
FAN_IN, LEVELS, WHOLE_VECTORS = 16, 4, 8  # of a sum by cascade


@torch.inference_mode()
def round_in_order(
    config: ModelConfig, tensors: Mapping[str, Tensor], tokens: Int32[Tensor, "B T"], round_layer: RoundLayer
) -> None:
    """Call `round_layer` for the blocks' matrices and the head, each on inputs that rounded ones made.

    Embeddings stay float here, that of a tied head too.

    Args:
      config: shape.
      tensors: float, by module name, matrices (O, I); not changed.
      tokens: calibration text.
      round_layer: returns the float weights that the rounded ones stand for.

    Raises:
      UserError: an activation is NaN or infinite; the message names the layer.
    """
    model = float_model(config, dict(tensors))
    stream = torch.stack([_embed(model, row) for row in tokens.long()])
    for index, module in enumerate(model.h):
        block = cast(Block, module)
        for name in BLOCK_LINEARS:
            layer = cast(nn.Linear, block.get_submodule(name))
            name = f"h.{index}.{name}"
            moments = _second_moments(layer, functools.partial(_run_block, block, stream), name)
            layer.weight = nn.Parameter(round_layer(name, layer.weight, moments), requires_grad=False)
        stream = _run_block(block, stream)
    head = linear_layers(config)[HEAD].matrix
    moments = _sum((_product(model.ln_f(row)) for row in stream), config.n_embd)
    round_layer(head, tensors[f"{head}.weight"], _finite(moments, HEAD))


def _embed(model: GPT, tokens: Tensor) -> Tensor:
    x = model.wte(tokens)
    return x if model.wpe is None else x + model.wpe(torch.arange(len(tokens)))


def _run_block(block: Block, stream: Tensor) -> Tensor:
    return torch.cat([block(row[None]) for row in stream])


def _second_moments(layer: nn.Module, run: Callable[[], Tensor], name: str) -> Float64[Tensor, "I I"]:
    """Return the sum of x x^T over what enters a layer while something runs."""
    total = torch.zeros((), dtype=torch.float64)

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        total = total + _product(args[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return _finite(total, name)


def _product(x: Float[Tensor, "*N I"]) -> Float64[Tensor, "I I"]:
    x = x.flatten(0, -2)
    return (x.t() @ x).double()


def _sum(parts: Iterable[Float64[Tensor, "I I"]], width: int) -> Float64[Tensor, "I I"]:
    """Add matrices (width, width) by cascade (16, then 16 of those sums, ...), holding one and four sums.

    That is the order of `torch.stack(parts).sum(dim=0)`, whose bits the moments of the head have always had;
    where rows are no whole vectors, which no large model has, PyTorch adds what is left over in another one.
    """
    if width % WHOLE_VECTORS:
        return torch.stack(list(parts)).sum(dim=0)
    sums = [torch.zeros(width, width, dtype=torch.float64) for _ in range(LEVELS)]
    for count, part in enumerate(parts, 1):
        sums[0] += part
        for level in range(1, LEVELS):
            if count % FAN_IN**level:
                break
            sums[level] += sums[level - 1]
            sums[level - 1].zero_()
    return functools.reduce(torch.add, sums)


def _finite(moments: Float64[Tensor, "I I"], name: str) -> Float64[Tensor, "I I"]:
    if not bool(torch.isfinite(moments).all()):
        raise UserError(f"calibration: the input of {name} holds NaN or infinity; check the checkpoint")
    return moments
