"""`jaxgpt-export program`: an artifact -> one torch.export program; it needs PyTorch and none of this code.

    jaxgpt-export program --artifact ART --out FILE.pt2
    logits = torch.export.load(FILE.pt2).module()(tokens)    (B, T) int64 -> (B, T, V), T <= block_size

What runs is what `model.gpt` runs, but for two layers, whose own forms can't be stored: INT8 products go
through torch._int_mm, because the packed weights of other kernels are objects of this CPU; weight-only layers
form their float32 weights at every call, because the file would hold them otherwise. Neither changes a bit of
the result (sums of integers are exact), and the file is read back and compared before it gets its name.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxgpt.shared.architecture import HEAD, matrices, norms
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.files import check_new_file, new_file, sha256_of
from jaxtyping import Integer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.model.arithmetic import dequantize
from jaxgpt_export.model.build import build_model
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.model.int8_linear import Int8Linear
from jaxgpt_export.model.weight_only import WeightOnlyLinear

# The program calls the operators that the module calls, so the logits are equal bit for bit here. Where a
# PyTorch fuses a float operator differently, float32 logits of size 10 move by 1e-6; a wrong layer by 1e-1.
MAX_PROGRAM_DIFF = 1e-5


@dataclasses.dataclass(frozen=True)
class ProgramOptions:
    """Write an artifact as a torch.export program.

    Attributes:
      artifact: the artifact folder, float32 or quantized.
      out: the file to write, NAME.pt2.
      overwrite: replace an earlier file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    out: Path
    overwrite: bool = False
    json: bool = False


class StorableInt8Linear(nn.Module):
    """An `Int8Linear` whose product is torch._int_mm on its plain weights."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = self.layer.weight

        def product(q: Tensor) -> Tensor:
            sums = torch._int_mm(q.to(torch.int8).flatten(0, -2), weight.t())
            return sums.float().view(*q.shape[:-1], len(weight))

        return self.layer.compute(x, product)


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


def program_command(options: ProgramOptions) -> Result:
    """Run `jaxgpt-export program`; exit code 1, and no file, when the program computes something else."""
    check_new_file(options.out, options.overwrite, ".pt2")
    artifact = read_artifact(options.artifact)
    probe = read_probe(artifact)
    model = build_model(artifact)
    weights = artifact.folder / "model.safetensors"
    about = {"kind": artifact.kind, "artifact": str(artifact.folder), "weights_sha256": sha256_of(weights)}
    with new_file(options.out) as path:
        with path.open("wb") as file:
            torch.export.save(exported(model), file, extra_files={"artifact.json": json.dumps(about)})
        with path.open("rb") as file:
            program = torch.export.load(file).module()
        difference = largest_difference(model, program, torch.from_numpy(probe.tokens))
        passed = difference <= MAX_PROGRAM_DIFF
        if not passed:
            path.unlink()
    figures: dict[str, Any] = {**about, "max_abs_logit_diff": difference}
    text = f"logits of the program and of the module differ by at most {difference:.2e}"
    if not passed:
        say(f"FAIL  {text}, {MAX_PROGRAM_DIFF:.0e} is allowed; no file was written")
        return Result(figures, passed=False)
    size = options.out.stat().st_size
    say(f"{options.out}: {artifact.kind}, {size / 1e6:.2f} MB; {text}")
    return Result({**figures, "size_mb": size / 1e6})
