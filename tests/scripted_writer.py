"""A model whose texts are given, for tests of what is made of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxgpt_bench.evaluate.writers import Writer

from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer


class Script:
    """A session that writes given texts, whatever the prompt: a sure logit a token. All score alike."""

    block_size = 512

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._texts = iter(texts)
        self._rest: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        self._rest = [*self.tokenizer.encode(next(self._texts)), self.tokenizer.endoftext]
        return self.decode(0)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        logits = np.zeros(self.tokenizer.vocab_size, np.float32)
        logits[self._rest.pop(0)] = 1000.0
        return logits

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        return np.zeros((len(tokens), self.tokenizer.vocab_size), np.float32)

    def truncate(self, length: int) -> None:
        pass


def scripted(data: Path, texts: Sequence[str]) -> Writer:
    """Return a writer of these texts, with a data set's tokenizer."""
    tokenizer = load_tokenizer(data)
    return Writer("model", "fp32", "script", Script(tokenizer, texts), tokenizer, "0" * 64)
