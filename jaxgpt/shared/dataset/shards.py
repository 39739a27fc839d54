"""A token stream that lies in several files, read by memory map as if it were one array."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TOKEN_DTYPE = np.dtype("<u2")
OPEN_MAPS = 128  # at a time: each takes a file descriptor

Tokens = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.uint8]  # a bit a token


class Shards:
    """Files of values, one after the other, that are mapped when they are read.

    Args:
      paths: the files, in order.
      lengths: values in each; of a mask, bits.
      dtype: of the values that the files hold.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._ends = np.cumsum(lengths).astype(np.int64)
        self._begins = self._ends - np.asarray(lengths, np.int64)

        @functools.lru_cache(OPEN_MAPS)
        def mapped(number: int) -> npt.NDArray[Any]:
            return map_file(paths[number], dtype)

        self._mapped = mapped

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(
        self, begin: int, end: int, part: Callable[[npt.NDArray[Any], int, int], npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Return what `part` takes of each file in which begin ... end - 1 lie, counted within the file."""
        found = []
        number = int(np.searchsorted(self._ends, begin, "right"))
        while begin < end:
            first, last = int(self._begins[number]), int(self._ends[number])
            stop = min(end, last)
            if begin < stop:
                found.append(part(self._mapped(number), begin - first, stop - first))
            begin, number = stop, number + 1
        return found


class ShardedTokens(Shards):
    """Tokens (N,) in several files: len(), slices and single tokens, np.asarray() for all."""

    dtype = TOKEN_DTYPE

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int]) -> None:
        super().__init__(paths, lengths, TOKEN_DTYPE)

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self),)

    def __getitem__(self, index: slice) -> Tokens:
        begin, end, step = index.indices(len(self))
        found = self._read(begin, end, lambda tokens, low, high: tokens[low:high])
        joined = np.concatenate(found) if len(found) != 1 else found[0]
        return np.asarray(joined[::step]) if found else np.zeros(0, TOKEN_DTYPE)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[:], dtype or TOKEN_DTYPE)


class ShardedMask(Shards):
    """A bit a token, each file's bits from a byte of its own."""

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int]) -> None:
        super().__init__(paths, lengths, np.dtype(np.uint8))

    def counted(self, begin: int, end: int) -> npt.NDArray[np.bool_]:
        """Return the bits begin ... end - 1."""
        return np.concatenate([np.zeros(0, np.bool_), *self._read(begin, end, bits)])


def bits(mask: Mask, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Return the bits begin ... end - 1 of a mask."""
    first = begin // 8
    found = np.unpackbits(np.asarray(mask[first : -(-end // 8)]), bitorder="little")
    return found[begin - 8 * first : end - 8 * first].astype(np.bool_)


def pack_mask(counts: npt.NDArray[np.bool_]) -> Mask:
    """Return which tokens the loss counts, (N,), as the bits that a data set holds: (ceil(N / 8),)."""
    return np.packbits(counts, bitorder="little")


def map_file(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map a file's values into memory; an empty one, which can't be mapped, is an empty array."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
