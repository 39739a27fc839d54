"""Finds documents that stand elsewhere before: hashes of all units, sorted part by part.

    duplicates/00000.npy   unit and position of each document that is dropped, in this order

A part holds the hashes that begin with its bits, so that it fits into memory whatever the source's size.
"""

from typing import Any

import numpy as np

from jaxgpt.data.stages.read import duplicate_parts, records_of
from jaxgpt.data.work.work_folder import Advance, Stage, Work
from jaxgpt.shared.files import new_file

DROPPED = np.dtype([("unit", "<u4"), ("position", "<u4")])


def find_duplicates(work: Work, part: int, advance: Advance) -> dict[str, Any]:
    """Write which documents of a part are dropped: of equal ones all but the first of the source."""
    bits = duplicate_parts(work).bit_length() - 1
    found = []
    for number in range(len(work.units)):
        records = records_of(work, number)
        high = np.asarray(records["high"])
        mine = np.flatnonzero(high >> np.uint64(64 - bits) == part) if bits else np.arange(len(high))
        places = np.empty(len(mine), DROPPED)
        places["unit"], places["position"] = number, mine
        found.append((high[mine], np.asarray(records["low"])[mine], places))
        advance(0)
    high, low, places = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort((low, high))  # stable: of equal hashes the source's first comes first
    high, low = high[order], low[order]
    repeated = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    dropped = np.sort(places[order[1:][repeated]])
    with new_file(work.path("duplicates", part, ".npy")) as path, path.open("wb") as file:
        np.save(file, dropped)
    return {"duplicates": len(dropped)}


DUPLICATES = Stage(name="duplicates", count=duplicate_parts, run=find_duplicates, files=(".npy",))
