"""A module as a torch.export program.

What runs is what `model.gpt` runs, but for two layers, whose own forms can't be stored: INT8 products go
through torch._int_mm, because the packed weights of other kernels are objects of this CPU; weight-only layers
form their float32 weights at every call, because the file would hold them otherwise. Neither changes a bit of
the result: sums of integers are exact.
"""

import torch
from jaxgpt.shared.architecture import HEAD, matrices, norms
from jaxtyping import Integer
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


def _storable(layer: nn.Module) -> nn.Module:
    if isinstance(layer, Int8Linear):
        return StorableInt8Linear(layer)
    return StorableWeightOnlyLinear(layer) if isinstance(layer, WeightOnlyLinear) else layer


def storable(model: GPT) -> GPT:
    """Return a module with the same weights, each in a layer that torch.export can store."""
    names = [*matrices(model.config), HEAD]
    layers = {name: _storable(model.get_submodule(name)) for name in names}
    copied = GPT(model.config, layers, model.exact)
    for name in norms(model.config):
        norm = model.get_submodule(name)
        copied.get_submodule(name).load_state_dict(norm.state_dict())
    return copied.eval().requires_grad_(False)


def exported(model: GPT) -> ExportedProgram:
    """Trace a module with open batch and time; what it rounds and how is in the graph."""
    block_size = model.config.block_size
    example = torch.zeros(2, min(2, block_size), dtype=torch.int64)
    open_sizes = {0: Dim("batch", min=1)}
    if block_size > 1:
        open_sizes[1] = Dim("time", min=1, max=block_size)
    with torch.no_grad():
        return torch.export.export(storable(model), (example,), dynamic_shapes={"tokens": open_sizes})


@torch.inference_mode()
def largest_difference(model: GPT, program: nn.Module, tokens: Integer[Tensor, "B T"]) -> float:
    """Return the largest difference of a logit, over each text alone and over the starts of all at once."""
    texts = [*tokens.long().split(1), tokens[:, :3].long()]
    return max(float((program(text) - model(text)).abs().max()) for text in texts)
