"""Generation with the native engine: slots, prefill, decode, logits."""

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxgpt.generation.sampling import Sampling, Top
from jaxgpt.shared.errors import UserError

from jaxgpt_export.native.library import call_engine, engine_library
from jaxgpt_export.native.native_model import NativeModel, free_with

CACHES = {"fp32": 0, "fp16": 1, "int8": 2}
# jaxgpt_sampling of engine.h.
DRAWN = np.dtype(
    [("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("uniform", "f8"), ("top_k", "i4")], align=True
)
MOST_SLOTS = 1 << 16  # as in engine.cpp
CacheKind = Literal["fp32", "fp16", "int8"]


class NativeSession:
    """Generates with a native model and a KV cache; a `Session` of jaxgpt.generation for one text.

    Args:
      model: may be shared by sessions.
      slots: texts that are generated side by side, at most MOST_SLOTS.
      cache: what keys and values are kept as.

    Raises:
      UserError: no session has so many slots.
    """

    def __init__(self, model: NativeModel, slots: int = 1, cache: CacheKind = "fp16") -> None:
        if not 1 <= slots <= MOST_SLOTS:
            raise UserError(f"slots ({slots}) must be from 1 to {MOST_SLOTS}")
        self.model = model
        self.slots = slots
        self.block_size = model.config.block_size
        self._handle = ctypes.c_void_p()
        free_with(self, _free_session, self._handle, model)  # an interrupt may follow the call
        call_engine("jaxgpt_session_new", model._handle, slots, CACHES[cache], ctypes.byref(self._handle))

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Take a prompt of 1 to block_size tokens into slot 0; return the logits (V,) after it."""
        self.truncate(0)
        return self.forward(tokens)[0]

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one more token; return the logits (V,) after it."""
        return self.forward([token])[0]

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget the tokens of a slot from `length` on."""
        call_engine("jaxgpt_session_truncate", self._handle, slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` tokens of slot `source`, and nothing else."""
        call_engine("jaxgpt_session_copy", self._handle, source, target, length)

    def release(self, slot: int) -> None:
        """Forget a slot and give its memory back to the system."""
        call_engine("jaxgpt_session_release", self._handle, slot)

    def touch(self, slot: int, tokens: int) -> None:
        """Let the system back the memory of a slot's first positions now; what it holds stays."""
        call_engine("jaxgpt_session_touch", self._handle, slot, tokens)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that a token takes in all layers."""
        return int(engine_library().jaxgpt_session_bytes_per_token(self._handle))

    def length(self, slot: int = 0) -> int:
        """Return the number of tokens that a slot holds."""
        return int(engine_library().jaxgpt_session_length(self._handle, slot))

    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int] | None = None,
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Take tokens, each the next one of its slot.

        Args:
          tokens: (M,) ids.
          slots: (M,) of each; the tokens of a slot are neighbours. None: all are of slot 0.
          all_logits: give the logits after every token, not only after the last one of each slot.
          wanted: (M,), the tokens after which logits are given; None: as all_logits says. For a step in which
            none is wanted the head is not computed.

        Returns:
          Logits (tokens that are wanted, V), in order.
        """
        order = self._order(tokens, slots, all_logits, wanted)
        logits = np.empty((int(order[2].sum()), self.model.config.vocab_size), dtype=np.float32)
        self._forward(order, logits, None)
        return logits

    def greedy(
        self,
        tokens: Sequence[int],
        slots: Sequence[int] | None = None,
        all_logits: bool = False,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Take tokens as `forward` does; return the most probable next one, the lowest of equals.

        Raises:
          UserError: a logit of a row that is wanted is not finite; every slot holds what it held before.
        """
        order = self._order(tokens, slots, all_logits, wanted)
        best = np.empty(int(order[2].sum()), dtype=np.int32)
        self._forward(order, None, best)
        return best

    def decode_greedy(
        self, token: int, max_tokens: int = 1, stop_token: int = -1, slot: int = 0
    ) -> list[int]:
        """Take a token into a slot and go on greedily; return what follows it.

        Args:
          token: the next one.
          max_tokens: tokens to return at most; all but the last of them are taken too.
          stop_token: a token after which there is no more.
          slot: of the text.

        Raises:
          UserError: the token is none, or the context has no room for so many; nothing was taken then.
        """
        if not 1 <= max_tokens <= self.block_size:
            raise UserError(
                f"max_tokens ({max_tokens}) must lie in 1 to {self.block_size}, the model's context"
            )
        if not 0 <= token < self.model.config.vocab_size:
            raise UserError(f"token {token} is not in a vocabulary of {self.model.config.vocab_size}")
        tokens, count = (ctypes.c_int32 * max_tokens)(), ctypes.c_int32()
        call_engine(
            "jaxgpt_session_decode_greedy",
            self._handle,
            slot,
            token,
            max_tokens,
            stop_token,
            tokens,
            ctypes.byref(count),
        )
        return tokens[: count.value]

    def _order(
        self,
        tokens: Sequence[int],
        slots: Sequence[int] | None,
        all_logits: bool,
        asked: npt.NDArray[np.bool_] | None,
    ) -> tuple[Any, Any, Any]:
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        places = np.zeros_like(ids) if slots is None else np.ascontiguousarray(slots, dtype=np.int32)
        if ids.ndim != 1 or ids.shape != places.shape:
            raise ValueError(f"tokens are {ids.shape}, slots {places.shape}; expected a slot for each token")
        wanted = np.ones(len(ids), dtype=np.uint8)
        if asked is not None:
            wanted = np.ascontiguousarray(asked, dtype=np.uint8)
        elif not all_logits:
            wanted[:-1] = places[1:] != places[:-1]
        if ids.shape != wanted.shape:
            raise ValueError(f"tokens are {ids.shape}, wanted {wanted.shape}; expected a word for each token")
        return ids, places, wanted

    def _forward(self, order: tuple[Any, Any, Any], logits: Any, best: Any) -> None:
        ids, places, wanted = order
        inputs = (array.ctypes.data for array in (places, ids, wanted))
        outputs = (None if array is None else array.ctypes.data for array in (logits, best))
        call_engine("jaxgpt_session_forward", self._handle, len(ids), *inputs, *outputs)

    def draw(
        self, logits: npt.NDArray[np.float32], samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        """Draw a token from each row of logits (M, V); see `draw_token` of jaxgpt.generation.sampling.

        Args:
          logits: (M, V).
          samplings: (M,), how each is drawn.
          uniforms: (M,), random numbers in [0, 1).

        Returns:
          Ids; None where a logit is not finite.
        """
        rows, columns = logits.shape
        logits = np.ascontiguousarray(logits)
        asked = np.zeros(rows, DRAWN)
        for i, (sampling, uniform) in enumerate(zip(samplings, uniforms, strict=True)):
            top_k = min(sampling.top_k, columns)
            asked[i] = sampling.temperature, sampling.top_p, sampling.min_p, uniform, top_k
        tokens = np.empty(rows, np.int32)
        inputs = (logits.ctypes.data, asked.ctypes.data)
        call_engine("jaxgpt_draw", self.model._handle, rows, columns, *inputs, tokens.ctypes.data)
        return [token if token >= 0 else None for token in tokens.tolist()]

    def top(
        self, logits: npt.NDArray[np.float32], temperatures: Sequence[float], count: int
    ) -> list[Top | None]:
        """Return what scoring needs of rows of logits (M, V); see `top_of_row` of jaxgpt.generation.sampling.

        Returns:
          A Top a row; None where a logit is not finite.
        """
        rows, columns = logits.shape
        count = min(count, columns)
        logits = np.ascontiguousarray(logits)
        divided_by = np.array(temperatures, dtype=np.float64)
        ids, scaled = np.empty((rows, count), np.int32), np.empty((rows, count), np.float64)
        totals, finite = np.empty(rows, np.float64), np.empty(rows, np.uint8)
        outputs = (array.ctypes.data for array in (ids, scaled, totals, finite))
        inputs = (logits.ctypes.data, divided_by.ctypes.data)
        call_engine("jaxgpt_top", self.model._handle, rows, columns, *inputs, count, *outputs)
        found = zip(ids, scaled, totals.tolist(), finite, strict=True)
        return [Top(row, values, total) if whole else None for row, values, total, whole in found]

    def use_screen(self, use: bool) -> None:
        """Whether this session's greedy steps read the head's screen first; by default they do."""
        call_engine("jaxgpt_session_use_screen", self._handle, int(use))

    @property
    def exact_outputs(self) -> int:
        """How many outputs of the head screened steps computed exactly so far."""
        return int(engine_library().jaxgpt_session_exact_outputs(self._handle))


def _free_session(handle: ctypes.c_void_p, _model: NativeModel) -> None:
    """Free a session before its model, which lives as long as this is to be called."""
    engine_library().jaxgpt_session_free(handle)
