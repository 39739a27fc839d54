"""The order of the data: a pure function of seed and step, so that a resumed run sees what it would have.

An epoch predicts each token of the split (but the first) exactly once: the stream is cut into windows of
block_size, beginning at an offset drawn for the epoch, and the windows are shuffled. The few positions
before the stream's begin and after its end have target -1 and do not count, and so have tokens that the
data set's mask leaves out (`jaxgpt prepare --answers-only`), but for the share of them that
prompt_loss_weight counts.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.dataset import Mask, ShardedMask, ShardedTokens, Tokens, counted

IGNORED = -1

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


@dataclasses.dataclass
class Batches:
    """Training batches of a token stream.

    Attributes:
      tokens: (N,), the training split.
      block_size: T.
      batch_size: sequences an optimizer step, all processes together.
      seed: of the order.
      mask: which tokens the loss counts, a bit each; None for all.
      prompt_loss_weight: share of the other tokens that it counts too, drawn for each epoch.
    """

    tokens: Tokens | ShardedTokens
    block_size: int
    batch_size: int
    seed: int
    mask: Mask | ShardedMask | None = None
    prompt_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        # Enough windows to cover the stream at every offset, so that epochs are equally long.
        self.windows_per_epoch = -(-(len(self.tokens) - 1) // self.block_size) + 1
        self._epoch = -1
        self._offset = 0
        self._order = np.zeros(0, np.int64)

    def at(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the batch of a step.

        Args:
          step: from 0 on.
          rows: the sequences that this process needs.

        Returns:
          inputs: (rows, T).
          targets: (rows, T); -1 where there is nothing to predict.
        """
        first = step * self.batch_size
        numbers = range(first, first + self.batch_size)[rows]
        inputs = np.zeros((len(numbers), self.block_size), np.int32)
        targets = np.full((len(numbers), self.block_size), IGNORED, np.int32)
        for row, number in enumerate(numbers):
            self._fill(*divmod(number, self.windows_per_epoch), inputs[row], targets[row])
        return inputs, targets

    def micro(self, step: int, grad_accum_steps: int, rows: slice) -> Batch:
        """Return the same sequences of each micro-batch of a step.

        Args:
          step: from 0 on.
          grad_accum_steps: A, micro-batches of the step.
          rows: which of a micro-batch's sequences.

        Returns:
          inputs and targets: (A, rows, T).
        """
        size = self.batch_size // grad_accum_steps
        start, stop, _ = rows.indices(size)
        parts = [self.at(step, slice(a * size + start, a * size + stop)) for a in range(grad_accum_steps)]
        return np.stack([inputs for inputs, _ in parts]), np.stack([targets for _, targets in parts])

    def _fill(
        self, epoch: int, position: int, inputs: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
    ) -> None:
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._epoch = epoch
            self._offset = int(random.integers(self.block_size))
            self._order = random.permutation(self.windows_per_epoch)
        begin = int(self._order[position]) * self.block_size - self._offset
        low, high = max(begin, 0), min(begin + self.block_size, len(self.tokens) - 1)
        if low < high:
            inputs[low - begin : high - begin] = self.tokens[low:high]
            targets[low - begin : high - begin] = self.tokens[low + 1 : high + 1]
            if self.mask is not None:
                left_out = ~counted(self.mask, low + 1, high + 1)
                if self.prompt_loss_weight > 0:
                    random = np.random.default_rng([self.seed, epoch, position])
                    left_out &= random.random(len(left_out)) >= self.prompt_loss_weight
                targets[low - begin : high - begin][left_out] = IGNORED
