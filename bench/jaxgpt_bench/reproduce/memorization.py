"""What a text has word for word from the training text, without an index on disk.

A run of tokens is looked up by a 64-bit hash of every run of its length in the corpus, and the first place of
its hash is compared token by token. So an answer "occurs" is certain; "does not" is wrong only where another
run of the same hash stands before it in the corpus. `jaxgpt prepare` drops overlapping validation documents
by another hash; this counts them anew.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.overlap import OVERLAP_TOKENS
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset, ShardedTokens, Tokens
from jaxgpt.shared.machine import usable_cores
from jaxgpt.shared.tokenizer import Tokenizer

UInt64 = npt.NDArray[np.uint64]

_FACTOR = 0xD1342543DE82EF95  # odd, so that it has an inverse modulo 2^64
_RUNS_AT_A_TIME = 2**17  # hashed by a thread: within the processor's cache
_FILTER_BITS = 24  # of the hash, the high ones: the low bits of such a sum hardly depend on the order


class Corpus:
    """Tokens in which runs are looked up.

    Args:
      tokens: (N,), documents separated by a token that no run holds.
    """

    def __init__(self, tokens: Tokens | ShardedTokens) -> None:
        self.tokens: Tokens = np.asarray(tokens)
        # hash of tokens[i:i+L] = sum_j value(tokens[i+j]) factor^j = (sums[i+L] - sums[i]) / factor^i
        self._sums = _sums(self.tokens)
        self._inverses = _powers(pow(_FACTOR, -1, 2**64), len(self.tokens))

    def occurs(self, runs: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        """Tell which runs occur.

        Args:
          runs: (R, L), L >= 1.

        Returns:
          (R,).
        """
        count, length = runs.shape
        found = np.zeros(count, bool)
        if not count or length > len(self.tokens):
            return found
        hashes = _sums(runs)[:, -1]
        order = np.argsort(hashes)
        sorted_hashes = hashes[order]
        marked = np.zeros(2**_FILTER_BITS, bool)
        shift = np.uint64(64 - _FILTER_BITS)
        marked[hashes >> shift] = True

        def first_places(start: int) -> tuple[UInt64, npt.NDArray[np.int64]]:
            theirs = self._hashes(length, start, start + _RUNS_AT_A_TIME)
            likely = np.flatnonzero(marked[theirs >> shift])
            at = np.minimum(np.searchsorted(sorted_hashes, theirs[likely]), count - 1)
            likely = likely[sorted_hashes[at] == theirs[likely]]
            each, first = np.unique(theirs[likely], return_index=True)
            return each, likely[first] + start

        with ThreadPoolExecutor(usable_cores()) as pool:
            parts = list(pool.map(first_places, range(0, len(self.tokens) - length + 1, _RUNS_AT_A_TIME)))
        theirs, places = (np.concatenate(each) for each in zip(*parts, strict=True))
        first_hash, first = np.unique(theirs, return_index=True)
        for place, value in zip(places[first], first_hash, strict=True):
            begin, end = np.searchsorted(sorted_hashes, value), np.searchsorted(sorted_hashes, value, "right")
            same = order[begin:end]
            found[same] = (runs[same] == self.tokens[place : place + length]).all(axis=1)
        return found

    def _hashes(self, length: int, start: int, stop: int) -> UInt64:
        """Return the hashes of the runs that begin at start ... stop - 1, as far as there are such runs."""
        stop = min(stop, len(self.tokens) - length + 1)
        hashes = self._sums[start + length : stop + length] - self._sums[start:stop]
        hashes *= self._inverses[start:stop]
        return hashes


@functools.cache
def _values() -> UInt64:
    return np.random.default_rng(1).integers(0, 2**64, 2**16, np.uint64)


def _powers(factor: int, count: int) -> UInt64:
    powers = np.full(max(count, 1), factor, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _sums(tokens: npt.NDArray[np.uint16]) -> UInt64:
    """Return sums over the last axis of value(token_j) factor^j, (..., N + 1), beginning with 0."""
    terms = _values()[tokens]
    terms *= _powers(_FACTOR, tokens.shape[-1])[: tokens.shape[-1]]
    sums = np.zeros((*tokens.shape[:-1], tokens.shape[-1] + 1), np.uint64)
    np.cumsum(terms, axis=-1, out=sums[..., 1:])
    return sums


def runs_of(text: Tokens | Sequence[int], length: int) -> npt.NDArray[np.uint16]:
    """Return every run of a length in a text: (max(len(text) - length + 1, 0), length)."""
    array = np.asarray(text, np.uint16)
    if len(array) < length:
        return np.zeros((0, length), np.uint16)
    return np.lib.stride_tricks.sliding_window_view(array, length)


def longest_runs(corpus: Corpus, texts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Find the longest run of each text that occurs in the corpus.

    Where a run of L tokens occurs, so do those of L - 1: each text's length is halved upon, all texts
    that ask for the same length being looked up together.

    Args:
      corpus: where to look.
      texts: without the token that separates documents.

    Returns:
      For each text the first place of its longest run, and the run's length (0: no token occurs).
    """
    found = [(0, 0)] * len(texts)
    low, high = [0] * len(texts), [len(text) for text in texts]
    while any(a < b for a, b in zip(low, high, strict=True)):
        wanted: dict[int, list[int]] = {}
        for index, (a, b) in enumerate(zip(low, high, strict=True)):
            if a < b:
                wanted.setdefault(_next_length(a, b), []).append(index)
        for length, indices in wanted.items():
            runs = [runs_of(texts[index], length) for index in indices]
            hits = np.split(corpus.occurs(np.concatenate(runs)), np.cumsum([len(part) for part in runs])[:-1])
            for index, hit in zip(indices, hits, strict=True):
                if hit.any():
                    low[index], found[index] = length, (int(hit.argmax()), length)
                else:
                    high[index] = length - 1
    return found


def _next_length(low: int, high: int) -> int:
    """Choose between low + 1 and high: powers of two first, as most runs are short and lengths are shared."""
    doubled = max(2 * low, 1) if low & (low - 1) == 0 else high + 1
    return doubled if doubled < high else (low + high + 1) // 2


def overlap(corpus: Corpus, tokens: Tokens, endoftext: int, length: int) -> dict[str, int]:
    """Count documents, those of them that share a run with the corpus, and those too short to have one.

    Args:
      corpus: where to look.
      tokens: documents, each between two separators.
      endoftext: the separator.
      length: of a run.
    """
    array = np.asarray(tokens)
    separators = np.flatnonzero(array == endoftext)
    too_short = int((np.diff(separators) - 1 < length).sum())
    runs = runs_of(array, length)
    starts = np.arange(len(runs))
    inside = np.searchsorted(separators, starts) == np.searchsorted(separators, starts + length)
    starts = starts[inside]
    hits = np.zeros(len(starts), bool)
    for begin in range(0, len(starts), _RUNS_AT_ONCE):
        part = slice(begin, begin + _RUNS_AT_ONCE)
        hits[part] = corpus.occurs(runs[starts[part]])
    sharing = len(np.unique(np.searchsorted(separators, starts[hits])))
    return {"documents": max(len(separators) - 1, 0), "sharing": sharing, "too_short": too_short}


_RUNS_AT_ONCE = 100_000  # of 50 tokens: 40 MB of hashes


def describe(texts: Sequence[Sequence[int]], found: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return median and maximum of the longest runs, of how many texts, and how long those are."""
    lengths = [length for _, length in found]
    return {
        "texts": len(texts),
        "median_tokens": float(np.median(lengths)) if lengths else 0.0,
        "max_tokens": max(lengths, default=0),
        "median_text_tokens": float(np.median([len(text) for text in texts])) if texts else 0.0,
        "whole": sum(length == len(text) > 0 for text, (_, length) in zip(texts, found, strict=True)),
    }


def word_for_word(
    corpus: Corpus,
    dataset: Dataset,
    tokenizer: Tokenizer,
    sampled: dict[str, Any],
    quality: dict[str, Any],
) -> dict[str, Any]:
    """Measure what generated and held-out texts have word for word from the training split.

    Args:
      corpus: the training split.
      dataset: whose validation split is counted again.
      tokenizer: of the models.
      sampled: what `fixed_samples` gave.
      quality: what `jaxgpt-bench quality` gave, with the samples whose parsing is counted, and how their
        held-out documents go on, the yardstick.
    """
    say("counting overlaps of validation and training")
    shared = overlap(corpus, dataset.val, tokenizer.endoftext, OVERLAP_TOKENS)
    if "val_overlapping" in dataset.manifest["counts"]:
        shared["dropped"] = dataset.manifest["counts"]["val_overlapping"]
    written = [row["tokens"] for row in sampled["samples"]]
    groups = {"held-out": quality["held_out"], **quality["samples"]}
    lists = {
        name: [tokenizer.encode(row["text"], special=True) for row in rows] for name, rows in groups.items()
    }
    everything = [*written, *(text for texts in lists.values() for text in texts)]
    say(f"looking for the longest run of {len(everything)} texts in {len(corpus.tokens):,} tokens")
    found = longest_runs(corpus, everything)
    runs = [
        {"start": start, "tokens": length, "text": tokenizer.decode(text[start : start + length])}
        for text, (start, length) in zip(written, found, strict=False)
    ]
    summary, at = [], len(written)
    for name, texts in lists.items():
        summary.append({"name": name, **describe(texts, found[at : at + len(texts)])})
        at += len(texts)
    return {
        "overlap": {"run_tokens": OVERLAP_TOKENS, **shared},
        "train_tokens": len(corpus.tokens),
        "runs": runs,
        "summary": summary,
    }
