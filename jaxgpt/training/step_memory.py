"""How much memory a training step takes on each device, before anything is allocated.

Parameters and optimizer state follow from shapes and shardings. The peak of a step is the compiler's count.
"""

import bisect
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.console import say
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes


class StepMemory:
    """The memory of a training step over a mesh of simulated CPU devices.

    Args:
      model: shape.
      train: settings; grad_accum_steps is what is looked for.
      mesh: over which devices; their number divides the batch.

    Attributes:
      params_bytes: of a device's part of the parameters; the gradients take as many.
      optimizer_bytes: of its part of all other state.
      peaks: sequences of a device's micro-batch -> bytes at the peak, for those that were compiled.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig, mesh: Mesh) -> None:
        self._model, self._train, self._mesh = model, train, mesh
        # What a GPU would be given, but for its attention: this is about memory on GPUs.
        self._numerics = choose_numerics(model, train, "cpu", 0.0)[0]._replace(on_cpu=False)
        compiled = CompiledTraining(model, train, mesh, self._numerics)
        self.params_bytes = _shard_bytes(compiled.abstract.params, compiled.shardings.params)
        self.optimizer_bytes = _shard_bytes(compiled.abstract, compiled.shardings) - self.params_bytes
        self.peaks: dict[int, float] = {}

    def peak(self, sequences: int) -> float:
        """Return the bytes a device at the peak of a step; compiles it the first time.

        Args:
          sequences: of a micro-batch on each device; they divide a device's part of the batch.
        """
        if sequences not in self.peaks:
            each = sequences * self._mesh.size
            # Two micro-batches take what any number takes; a single one keeps no sum of gradients.
            A = min(self._train.batch_size // each, 2)
            train = dataclasses.replace(self._train, batch_size=A * each, grad_accum_steps=A)
            step = CompiledTraining(self._model, train, self._mesh, self._numerics).compile_step()
            self.peaks[sequences] = peak_bytes(step)
            text = f"{sequences} sequence(s) of {self._model.block_size} tokens a device and micro-batch"
            say(f"  {text}: {format_bytes(self.peaks[sequences])}, activations included")
        return self.peaks[sequences]

    def largest(self, memory: float) -> int:
        """Return the most sequences of a micro-batch whose step fits into so many bytes; 0 for none."""
        local = self._train.batch_size // self._mesh.size
        divisors = [n for n in range(1, local + 1) if local % n == 0]
        fitting = bisect.bisect_right(divisors, memory, key=self.peak)
        # A single micro-batch keeps no sum of gradients, and may take less than two halves.
        if fitting == len(divisors) - 2 and self.peak(local) <= memory:
            return local
        return divisors[fitting - 1] if fitting else 0


def _shard_bytes(tree: Any, shardings: Any) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def format_bytes(count: float | int) -> str:
    """Return such as "1.25 GB" or, below 0.1 GB, "12.34 MB"; 1 MB is 10^6 bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
