"""The graph in ONNX Runtime: cache and inputs stay in place, each new key and value is written into them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt_export.interchange.onnx.graph import MODEL_FILE

PAST, PRESENT = "past_key_values.", "present."

Bound = tuple[Any, npt.NDArray[np.int64], npt.NDArray[np.int64]]


class OnnxSession:
    """A session over a folder.

    Args:
      folder: with model.onnx.
      options: onnxruntime.SessionOptions; None for its own.
    """

    def __init__(self, folder: Path, options: Any = None) -> None:
        import onnxruntime

        path = str(folder / MODEL_FILE)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self.block_size = int(shapes[f"{PAST}0.key"][2])
        self._cache = {
            name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.startswith(PAST)
        }
        self._logits = np.zeros(self._session.get_outputs()[0].shape, np.float32)
        self._last, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._one = self._binding(1)
        self._length = 0

    def _binding(self, count: int) -> Bound:
        """Bind buffers for so many tokens at once."""
        tokens, positions = np.zeros((1, count), np.int64), np.zeros((1, count), np.int64)
        binding = self._session.io_binding()
        given: dict[str, Any] = {
            "input_ids": tokens,
            "position_ids": positions,
            "seqlens_k": self._last,
            "total_sequence_length": self._total,
        }
        for name, array in {**given, **self._cache}.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        made: dict[str, Any] = {"logits": self._logits} | {
            name.replace(PAST, PRESENT): array for name, array in self._cache.items()
        }
        for name, array in made.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding, tokens, positions

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Forget everything, take a prompt; return the logits (V,) after it, valid until the next call."""
        self._length = 0
        return self.extend(tokens)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it, valid until the next call."""
        return self._take([token], self._one)

    def extend(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take more tokens at once; return the logits (V,) after the last, valid until the next call."""
        return self._take(tokens, self._binding(len(tokens)))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._length = length

    def _take(self, tokens: Sequence[int], bound: Bound) -> npt.NDArray[np.float32]:
        binding, inputs, positions = bound
        inputs[0] = tokens
        positions[0] = range(self._length, self._length + len(tokens))
        self._length += len(tokens)
        self._last[0], self._total[0] = self._length - 1, self._length
        self._session.run_with_iobinding(binding)
        return self._logits[0, 0]
