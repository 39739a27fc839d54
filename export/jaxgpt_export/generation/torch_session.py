"""Generation with the PyTorch module, with a KV cache or without."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from jaxgpt_export.model.gpt import GPT


class TorchSession:
    """Generates with a module and a KV cache, one text at a time; a `ScoringSession` of jaxgpt.generation.

    Args:
      model: the module.
      rounded_to: see KVCache.
    """

    def __init__(self, model: GPT, rounded_to: torch.dtype = torch.float32) -> None:
        self.block_size = model.config.block_size
        self._model = model
        self._cache = model.new_cache(rounded_to=rounded_to)

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take a prompt of 1 to block_size tokens; return the logits (V,) after it."""
        self.truncate(0)
        return self.forward(tokens)[0]

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it."""
        return self.forward([token])[0]

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Take M tokens; return the logits after the last one (1, V), or after each (M, V)."""
        logits = self._model(torch.tensor([list(tokens)]), self._cache, last_only=not all_logits)
        array: npt.NDArray[np.float32] = logits[0].numpy()
        return array

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._cache.length = min(self._cache.length, length)


class UncachedTorchSession:
    """The same without a KV cache: every token runs the whole text again, as the earlier project did."""

    def __init__(self, model: GPT) -> None:
        self.block_size = model.config.block_size
        self._model = model
        self._tokens: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take a prompt; return the logits (V,) after it."""
        self._tokens = list(tokens[:-1])
        return self.decode(tokens[-1])

    @torch.inference_mode()
    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it."""
        self._tokens.append(token)
        array: npt.NDArray[np.float32] = self._model(torch.tensor([self._tokens]))[0, -1].numpy()
        return array
