"""What a request changes in the logits before a token is drawn: bias of tokens, penalties for repetition."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class LogitRules:
    """Changes of logits, as OpenAI's API defines them.

    Attributes:
      bias: token -> what is added to its logit.
      presence_penalty: taken from the logits of all tokens that were generated.
      frequency_penalty: the same, once for each time that a token was generated.
    """

    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.bias or self.presence_penalty or self.frequency_penalty)

    @functools.cached_property
    def _bias_arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Tokens and what is added to each: a request may name the whole vocabulary, and has many steps."""
        return np.array(list(self.bias), np.int64), np.array(list(self.bias.values()), np.float32)

    def apply(self, logits: npt.NDArray[np.float32], generated: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return changed logits (V,), given the tokens that were generated; the prompt's do not count."""
        changed = logits.copy()
        if self.bias:
            tokens, values = self._bias_arrays
            changed[tokens] += values
        if self.presence_penalty or self.frequency_penalty:
            for token, count in collections.Counter(generated).items():
                changed[token] -= self.presence_penalty + count * self.frequency_penalty
        return changed
