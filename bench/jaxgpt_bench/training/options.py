"""What `jaxgpt-bench train` may be told."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import tyro

from jaxgpt.shared.config import Precision


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Measure training steps beside PyTorch's.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      vocab_size: number of tokens.
      batch_size: sequences a step; the preset's if not given. On GPUs of each device; the devices of a CPU
        share it, as they share the cores.
      block_size: context, tokens; the preset's if not given.
      grad_accum_steps: micro-batches of a step.
      precision: of matrix products; if not given, what the device is best at.
      loss_chunks: pieces in which this trainer computes logits.
      vocab_multiple: this trainer pads the token table to a multiple.
      devices: numbers of devices that this trainer is measured with. PyTorch takes one GPU, or all cores.
      rounds: in each of which every trainer takes its turn.
      steps: of a turn.
      alone: leave PyTorch out.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--accumulate": "--grad-accum-steps"}

    preset: tyro.conf.Positional[str]
    vocab_size: int = 50_257
    batch_size: int | None = None
    block_size: int | None = None
    grad_accum_steps: int = 1
    precision: Precision | None = None
    loss_chunks: int = 1
    vocab_multiple: int = 1
    devices: tuple[int, ...] = (1,)
    rounds: int = 5
    steps: int = 10
    alone: bool = False
    out: Path | None = None
    json: bool = False
