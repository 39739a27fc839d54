"""Finds validation documents that share 50 consecutive tokens with the training text.

A model may know such a passage by heart; the loss on it says nothing of new text, so they are dropped.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.data.encode import join
from jaxgpt.shared.dataset import Tokens

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
    seen = np.unique(run_hashes(join(train, endoftext)))
    kept = []
    for index, document in enumerate(val):
        hashes = run_hashes(document)
        at = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1) if len(seen) else hashes[:0]
        if not len(at) or not (seen[at] == hashes).any():
            kept.append(index)
    return kept


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
