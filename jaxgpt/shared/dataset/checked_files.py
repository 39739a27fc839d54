"""Hashes of a data set's files, computed once and remembered while the files stay as they are.

What was checked is kept in the user's cache folder, a JSON file a data set: for each file its size, inode and
times, and what was found. A file that is touched in any way is read again; without the cache folder
everything is read each time.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.shared.files import write_json
from jaxgpt.shared.machine import usable_cores, user_cache_folder

CHUNK_BYTES = 1 << 22
# A file that changed less than this before it was read may change again with the same time.
SETTLED_NS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class CheckedFile:
    """What a file holds.

    Attributes:
      sha256: of its bytes.
      largest: of its 16-bit values; -1 where there is none.
    """

    sha256: str
    largest: int


def checked_files(folder: Path, names: Mapping[str, int]) -> dict[str, CheckedFile]:
    """Return what files of a folder hold: remembered, or read now.

    Args:
      folder: where they lie.
      names: file -> its bytes; they exist and are that long.
    """
    memory = (
        user_cache_folder() / "checked" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.json"
    )
    remembered = _read(memory)
    now = time.time_ns()
    stats = {name: _state(folder / name) for name in names}
    known = {
        name: CheckedFile(str(found["sha256"]), int(found["largest"]))
        for name, state in stats.items()
        if (found := remembered.get(name)) is not None and found["state"] == state
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        with ThreadPoolExecutor(usable_cores()) as pool:
            found_now = pool.map(lambda name: _check(folder / name), unknown)
            known |= dict(zip(unknown, found_now, strict=True))
        settled = [name for name in names if now - max(stats[name][2:]) > SETTLED_NS]
        entries = {name: {"state": stats[name], **dataclasses.asdict(known[name])} for name in settled}
        with contextlib.suppress(OSError):  # a cache that can't be written remembers nothing
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"folder": str(folder.resolve()), "files": entries})
    return {name: known[name] for name in names}


def _read(memory: Path) -> dict[str, Any]:
    try:
        files = json.loads(memory.read_text(encoding="utf-8"))["files"]
        return {
            name: entry for name, entry in files.items() if {"state", "sha256", "largest"} <= entry.keys()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _check(path: Path) -> CheckedFile:
    digest, largest = hashlib.sha256(), -1
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if values := len(chunk) // 2:
                largest = max(largest, int(np.frombuffer(chunk, "<u2", values).max()))
    return CheckedFile(digest.hexdigest(), largest)
