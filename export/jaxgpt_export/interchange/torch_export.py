"""A module as a torch.export program.

What runs is what `model.gpt` runs, but for layers whose own forms can't be stored: INT8 products go through
torch._int_mm, because the packed weights of other kernels are objects of this CPU; weight-only layers, and
those whose artifact holds float16, form their float32 weights at every call, because the file would hold them
otherwise. None of this changes a bit of the result: sums of integers are exact, and float32 holds float16.
"""

from collections.abc import Collection

import torch
from jaxgpt.shared.architecture import HEAD, matrices, norms
from jaxtyping import Float, Float16, Integer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from jaxgpt_export.model.arithmetic import dequantize
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.model.int8_linear import Int8Linear
from jaxgpt_export.model.weight_only import WeightOnlyLinear


class StorableInt8Linear(nn.Module):
    """An `Int8Linear` or `Int4Linear` whose product is torch._int_mm on its plain weights."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.layer.compute(x, self.layer.plain_product)


class StorableWeightOnlyLinear(nn.Module):
    """A `WeightOnlyLinear` that forms its float32 weights at every call."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__()
        for name in ("weight", "weight_scale", "bias"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(x, dequantize(self.weight, self.weight_scale), self.bias)


class StorableHalfLinear(nn.Module):
    """A float32 layer of float16 weights (O, I), which it widens at every call."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Float16[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight.float(), self.bias)


class StorableHalfEmbedding(nn.Module):
    """An embedding of float16 rows (V, C), which it widens when they are looked up."""

    weight: Tensor

    def __init__(self, weight: Float16[Tensor, "V C"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the rows up."""
        return F.embedding(tokens, self.weight).float()


def _storable(layer: nn.Module, half: Float16[Tensor, "O I"] | None) -> nn.Module:
    if isinstance(layer, Int8Linear):
        return StorableInt8Linear(layer)
    if isinstance(layer, WeightOnlyLinear):
        return StorableWeightOnlyLinear(layer)
    if half is not None and isinstance(layer, nn.Embedding):
        return StorableHalfEmbedding(half)
    return (
        StorableHalfLinear(half, layer.bias) if half is not None and isinstance(layer, nn.Linear) else layer
    )


def storable(model: GPT, half: Collection[str] = ()) -> GPT:
    """Return a module with the same weights, each in a layer that torch.export can store.

    Args:
      model: of an artifact.
      half: names of the matrices that the artifact holds in float16.
    """
    config = model.config
    halves: dict[str, Tensor] = {
        name: model.get_parameter(f"{name}.weight").detach().to(torch.float16) for name in half
    }
    if config.tied and "wte" in halves:
        halves[HEAD] = halves["wte"]  # the same tensor: stored once
    layers = {
        name: _storable(model.get_submodule(name), halves.get(name)) for name in (*matrices(config), HEAD)
    }
    copied = GPT(config, layers, model.exact)
    for name in norms(config):
        norm = model.get_submodule(name)
        copied.get_submodule(name).load_state_dict(norm.state_dict())
    return copied.eval().requires_grad_(False)


def exported(model: GPT, half: Collection[str] = ()) -> ExportedProgram:
    """Trace a module with open batch and time; what it rounds and how is in the graph.

    Args:
      model: of an artifact.
      half: names of the matrices that the artifact holds in float16.
    """
    block_size = model.config.block_size
    example = torch.zeros(2, min(2, block_size), dtype=torch.int64)
    open_sizes = {0: Dim("batch", min=1)}
    if block_size > 1:
        open_sizes[1] = Dim("time", min=1, max=block_size)
    with torch.no_grad():
        return torch.export.export(storable(model, half), (example,), dynamic_shapes={"tokens": open_sizes})


@torch.inference_mode()
def largest_difference(model: GPT, program: nn.Module, tokens: Integer[Tensor, "B T"]) -> float:
    """Return the largest difference of a logit, over each text alone and over the starts of all at once."""
    texts = [*tokens.long().split(1), tokens[:, :3].long()]
    return max(float((program(text) - model(text)).abs().max()) for text in texts)
