"""Finds validation documents that share 50 consecutive tokens with the training text.

A model may know such a passage by heart; the loss on it says nothing of new text, so they are dropped.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.data.encode import join
from jaxgpt.shared.dataset import Tokens

UInt64 = npt.NDArray[np.uint64]

OVERLAP_TOKENS = 50


def without_overlap(train: Sequence[Tokens], val: Sequence[Tokens], endoftext: int) -> list[int]:
    """Find the validation documents that share no run of 50 tokens with any training document.

    Runs are compared by a 64-bit hash. A document that shares a run is always found; one that shares none is
    dropped where two hashes collide (probability about 1e-7 for 2 M against 2 M runs).

    Args:
      train: training documents.
      val: validation documents.
      endoftext: separates documents, so that no run crosses two.

    Returns:
      Indices into `val`.
    """
    hashes = [run_hashes(document) for document in val]
    wanted = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    shared = _occurring(wanted, join(train, endoftext))
    return [index for index, found in enumerate(hashes) if not _in_sorted(found, shared).any()]


def _occurring(wanted: UInt64, tokens: Tokens) -> UInt64:
    """Return those of the wanted hashes that a run of the tokens has, sorted; some several times.

    Args:
      wanted: sorted; the validation split's, few beside the runs of the training text.
      tokens: (N,).
    """
    marked = np.zeros(2**_FILTER_BITS, bool)
    shift = np.uint64(64 - _FILTER_BITS)
    marked[wanted >> shift] = True
    found = [wanted[:0]]
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        hashes = run_hashes(tokens[start : start + _TOKENS_AT_ONCE + OVERLAP_TOKENS - 1])
        likely = hashes[marked[hashes >> shift]]
        found.append(likely[_in_sorted(likely, wanted)])
    return np.sort(np.concatenate(found))


def _in_sorted(hashes: UInt64, sorted_hashes: UInt64) -> npt.NDArray[np.bool_]:
    """Tell which hashes are among the sorted ones."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return sorted_hashes[at] == hashes


_FILTER_BITS = 24  # of a hash: most runs are passed over by a look into a table
_TOKENS_AT_ONCE = 2**17  # whose hashes stay in the processor's cache


def run_hashes(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """Hash every run of 50 consecutive tokens.

    Args:
      tokens: (N,).

    Returns:
      (max(N - 49, 0),) polynomial hashes modulo 2^64 over random 64-bit values of the tokens.
    """
    count = len(tokens) - OVERLAP_TOKENS + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    values = np.random.default_rng(0).integers(0, 2**64, 2**16, np.uint64)[tokens]
    hashes = np.zeros(count, np.uint64)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for offset in range(OVERLAP_TOKENS):
        hashes *= multiplier
        hashes += values[offset : offset + count]
    return hashes
