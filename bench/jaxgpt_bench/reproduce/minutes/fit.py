"""Which micro-batch of a training fits a device: the first that does, from the largest to the smallest.

Whether one fits is the compiler's count, taken when it is tried; the estimate here only spares compiling what
is far too large. A candidate that keeps all activations comes before one that computes them again (remat,
about a third more work), down to FEW sequences.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, TrainConfig

FEW = 4  # sequences of a micro-batch; smaller ones leave a GPU idle, so remat is tried first

# Bytes, after the peak of 16.8 GB of a step of GPT-2 (124M) in bf16 on one H200 with cuDNN's attention and 32
# sequences of 1024 tokens, less STATE_BYTES: 47 a token, layer and channel. Dropout's masks are in the rest.
ACTIVATION_BYTES = {"bf16": 56, "fp16": 56, "fp32": 96}  # a token, layer and channel
WEIGHT_BYTES = {"bf16": 8, "fp16": 8, "fp32": 12}  # an attention weight of XLA's attention, which keeps them
STATE_BYTES = 22  # a parameter: itself, gradient, sum of gradients, two moments, a copy in the compute dtype
LOGIT_BYTES = 8  # a logit of a chunk: itself and its gradient
QAT = 2.0  # times the activations, with what rounding keeps


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """How a step's batch is cut.

    Attributes:
      sequences: of a micro-batch on each device.
      remat: activations of a block are computed again in the backward pass.
    """

    sequences: int
    remat: bool

    def settings(self, batch_size: int, devices: int) -> dict[str, Any]:
        """Return the settings of a training with a batch of so many sequences."""
        sequences = min(self.sequences, batch_size // devices)
        return {
            "batch_size": batch_size,
            "grad_accum_steps": batch_size // (sequences * devices),
            "remat": self.remat,
        }

    def __str__(self) -> str:
        return f"{self.sequences} sequences{', remat' if self.remat else ''}"


def candidates(batch_size: int, devices: int) -> Iterator[MicroBatch]:
    """Yield the ways to cut a batch, the one that is tried first first.

    Args:
      batch_size: sequences a step, of all devices.
      devices: that share it evenly.
    """
    most = batch_size // devices
    sizes = [n for n in range(most, 0, -1) if most % n == 0 and (n & (n - 1) == 0 or n == most)]
    plain = [n for n in sizes if n >= min(FEW, most)]
    yield from (MicroBatch(n, remat=False) for n in plain)
    yield from (MicroBatch(n, remat=True) for n in sizes)


def estimated_bytes(model: ModelConfig, train: TrainConfig, micro: MicroBatch, flash: bool) -> float:
    """Estimate the peak of a step on a device, roughly and rather low.

    Args:
      model: shape.
      train: settings; how its batch is cut counts for nothing.
      micro: how it is cut instead.
      flash: attention never keeps its (T, T) weights.
    """
    tokens = micro.sequences * model.block_size
    per_layer: float = tokens * model.n_embd * ACTIVATION_BYTES[train.precision]
    if not flash:
        per_layer += tokens * model.block_size * model.n_head * WEIGHT_BYTES[train.precision]
    per_layer *= QAT if model.qat else 1.0
    streams = model.n_layer * tokens * model.n_embd * 4
    activations = streams + per_layer if micro.remat else model.n_layer * per_layer
    logits = tokens * model.vocab_size * LOGIT_BYTES / train.loss_chunks
    count = sum(math.prod(each.shape) for each in parameters(model))
    return count * STATE_BYTES + activations + logits
