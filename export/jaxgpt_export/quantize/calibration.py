"""What each linear layer's input looks like on calibration text."""

import dataclasses

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Int32
from torch import Tensor, nn

from jaxgpt_export.model.gpt import GPT

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
