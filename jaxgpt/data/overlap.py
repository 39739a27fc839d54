"""Runs of 50 consecutive tokens, by their hashes: which validation documents share one with training.

A model may know such a passage by heart; the loss on it says nothing of new text, so they are dropped. Runs
are compared by a 64-bit hash. A document that shares a run is always found; one that shares none is dropped
where two hashes collide (probability about 1e-7 for 2 M against 2 M runs).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.dataset import Tokens

UInt64 = npt.NDArray[np.uint64]

OVERLAP_TOKENS = 50
_MULTIPLIER = 0x9E3779B97F4A7C15
_VALUES = np.random.default_rng(0).integers(0, 2**64, 2**16, np.uint64)  # of the tokens


def run_hashes(tokens: Tokens) -> UInt64:
    """Hash every run of 50 consecutive tokens.

    Args:
      tokens: (N,).

    Returns:
      (max(N - 49, 0),) polynomial hashes modulo 2^64 over random 64-bit values of the tokens.
    """
    if len(tokens) < OVERLAP_TOKENS:
        return np.zeros(0, np.uint64)
    # Hashes of runs of 1, 2, 4 ... tokens; those of 50 = 32 + 16 + 2 are put together of them.
    power, length, runs = _VALUES[tokens], 1, OVERLAP_TOKENS
    found, found_length = np.zeros(len(tokens) + 1, np.uint64), 0
    while True:
        if runs & length:  # the shorter part stands before: found ends where the run of `length` ends
            count = len(tokens) - found_length - length + 1
            found = found[:count] * _factor(length) + power[found_length : found_length + count]
            found_length += length
        if found_length == OVERLAP_TOKENS:
            return found
        power = power[:-length] * _factor(length) + power[length:]
        length *= 2


def _factor(length: int) -> np.uint64:
    """Return the multiplier to the power of a length, modulo 2^64."""
    return np.uint64(pow(_MULTIPLIER, length, 2**64))


def document_runs(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> tuple[UInt64, npt.NDArray[np.intp]]:
    """Hash the runs that lie in one document.

    Args:
      tokens: (N,), documents with one token after each that separates them.
      lengths: tokens of each document.

    Returns:
      The hashes, and the document of each.
    """
    counts = np.maximum(lengths - OVERLAP_TOKENS + 1, 0)
    documents = np.repeat(np.arange(len(lengths)), counts)
    begins = np.cumsum(lengths + 1) - lengths - 1
    within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    return run_hashes(tokens)[begins[documents] + within], documents


class HashFilter:
    """A bit for each value of a hash's first bits: which hashes are certainly not among some.

    Args:
      bits: (2^K / 8,), the lowest bit first.
    """

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self._bits = bits
        self._shift = np.uint64(64 - (8 * len(bits)).bit_length() + 1)

    @classmethod
    def of(cls, hashes: Iterable[UInt64], count: int) -> "HashFilter":
        """Return a filter of about `count` hashes, given in parts."""
        size = min(max((_BITS_A_HASH * count).bit_length(), _LEAST_BITS), _MOST_BITS)
        made = cls(np.zeros(2**size // 8, np.uint8))
        for part in hashes:
            places = part >> made._shift
            bytes_of, bit_of = (places >> _THREE).astype(np.intp), (places & _SEVEN).astype(np.uint8)
            for bit in range(8):  # twice as fast as np.bitwise_or.at
                made._bits[bytes_of[bit_of == bit]] |= np.uint8(1 << bit)
        return made

    @classmethod
    def read(cls, path: Path) -> "HashFilter":
        """Map a filter that `write` wrote."""
        return cls(np.memmap(path, np.uint8, "r"))

    def write(self, path: Path) -> None:
        """Write the bits to a file."""
        self._bits.tofile(path)

    def may_hold(self, hashes: UInt64) -> npt.NDArray[np.bool_]:
        """Tell which hashes may be among those of the filter."""
        places = hashes >> self._shift
        bits = self._bits[places >> _THREE] >> (places & _SEVEN).astype(np.uint8)
        return (bits & _ONE).astype(np.bool_)


_BITS_A_HASH, _LEAST_BITS, _MOST_BITS = 32, 16, 29  # at most 64 MB
_THREE, _SEVEN, _ONE = np.uint64(3), np.uint64(7), np.uint8(1)


def sorted_once(hashes: UInt64) -> UInt64:
    """Return hashes in ascending order, each once; ten times as fast as np.unique."""
    found = np.sort(hashes)
    return found[np.concatenate([np.ones(min(len(found), 1), np.bool_), found[1:] != found[:-1]])]


def in_sorted(hashes: UInt64, sorted_hashes: UInt64) -> npt.NDArray[np.bool_]:
    """Tell which hashes are among sorted ones."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), np.bool_)
    at = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return np.asarray(sorted_hashes[at] == hashes)


def sharing(tokens: Tokens, lengths: npt.NDArray[np.int64], training: UInt64) -> npt.NDArray[np.bool_]:
    """Tell which documents share a run with training.

    Args:
      tokens: documents; see `document_runs`.
      lengths: tokens of each.
      training: hashes of runs of the training text, sorted.
    """
    hashes, documents = document_runs(tokens, lengths)
    shared = np.zeros(len(lengths), np.bool_)
    if len(training):
        likely = np.flatnonzero((hashes >= training[0]) & (hashes <= training[-1]))
        likely = likely[np.argsort(hashes[likely])]  # in order, what is looked up lies side by side
        shared[documents[likely[in_sorted(hashes[likely], training)]]] = True
    return shared
