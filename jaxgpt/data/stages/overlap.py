"""Drops validation documents that share 50 tokens in a row with training, with hashes that lie on disk.

filter/00000.bits     a bit filter of the hashes of validation; training is held against it while encoded
merged/00000.hashes   what passed of all shards, sorted, each once; a part for each value of its first bits
overlap/00012.npy     which validation documents of a part share a run with training
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.overlap import HashFilter, UInt64, document_runs, sharing, sorted_once
from jaxgpt.data.stages.read import part_summaries, parts_of
from jaxgpt.data.stages.shards import LENGTHS
from jaxgpt.data.work.work_folder import Advance, Stage, Work
from jaxgpt.shared.dataset import TOKEN_DTYPE, Tokens
from jaxgpt.shared.dataset.shards import map_file
from jaxgpt.shared.files import new_file

PART_HASHES = 1 << 21  # sorted at a time: 80 MB
_TOKENS_AT_ONCE = 1 << 20


def validation_batches(work: Work, number: int) -> Iterator[tuple[Tokens, npt.NDArray[np.int64]]]:
    """Yield the validation documents of a part, about a million tokens at a time, with their lengths."""
    lengths = map_file(work.path("validation", number, ".lengths"), LENGTHS)["tokens"].astype(np.int64)
    tokens = map_file(work.path("validation", number, ".tokens"), TOKEN_DTYPE)
    ends = np.cumsum(lengths + 1)
    begin, first = 0, 0
    while first < len(lengths):
        last = max(int(np.searchsorted(ends, begin + _TOKENS_AT_ONCE)), first) + 1
        end = int(ends[min(last, len(ends)) - 1])
        yield np.asarray(tokens[begin:end]), lengths[first:last]
        begin, first = end, last


def write_filter(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write the filter of the runs of all validation documents."""
    runs = sum(summary["runs"] for summary in part_summaries(work, "validation"))

    def hashes() -> Iterator[UInt64]:
        for part in range(len(parts_of(work))):
            for batch in validation_batches(work, part):
                yield document_runs(*batch)[0]
                advance(0)

    with new_file(work.path("filter", 0, ".bits")) as path:
        HashFilter.of(hashes(), runs).write(path)
    return {"runs": runs}


def merge_parts(work: Work) -> int:
    """Return into how many parts the hashes that passed are merged: a power of two."""
    hashes = sum(summary["hashes"] for summary in part_summaries(work, "training"))
    return 1 << max(0, -(-hashes // PART_HASHES) - 1).bit_length()


def merge_hashes(work: Work, part: int, advance: Advance) -> dict[str, Any]:
    """Write the hashes of all shards that lie in a part."""
    bits = merge_parts(work).bit_length() - 1
    found = [np.zeros(0, np.uint64)]
    for number in range(len(parts_of(work))):
        hashes = map_file(work.path("training", number, ".hashes"), np.dtype(np.uint64))
        low = part << (64 - bits) if bits else 0
        begin = np.searchsorted(hashes, np.uint64(low))
        last = part + 1 == 1 << bits
        end = len(hashes) if last else np.searchsorted(hashes, np.uint64((part + 1) << (64 - bits)))
        found.append(np.array(hashes[begin:end]))  # a copy, so that the file does not stay mapped
        advance(0)
    with new_file(work.path("merged", part, ".hashes")) as path:
        sorted_once(np.concatenate(found)).tofile(path)
    return {}


def find_overlap(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write which validation documents of a part share a run with training."""
    found = np.zeros(work.summary("validation", number)["documents"], np.bool_)
    for part in range(merge_parts(work)):  # one after the other: what is mapped takes memory
        hashes = map_file(work.path("merged", part, ".hashes"), np.dtype(np.uint64))
        first = 0
        for tokens, lengths in validation_batches(work, number):
            found[first : first + len(lengths)] |= sharing(tokens, lengths, hashes)
            first += len(lengths)
            advance(0)
    with new_file(work.path("overlap", number, ".npy")) as path, path.open("wb") as file:
        np.save(file, found)
    return {"overlapping": int(found.sum())}


FILTER = Stage(name="filter", count=lambda work: 1, run=write_filter, files=(".bits",))
MERGED = Stage(name="merged", count=merge_parts, run=merge_hashes, files=(".hashes",))
OVERLAP = Stage(name="overlap", count=lambda work: len(parts_of(work)), run=find_overlap, files=(".npy",))
