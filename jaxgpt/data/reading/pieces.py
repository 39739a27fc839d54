"""Cuts large files into pieces that are read by themselves, on several cores, with nothing read before them.

JSON lines are cut at line ends, .parquet at its row groups, texts at <|endoftext|> or where blocks end. What
is compressed, .csv, .arrow and JSON that is one value can't be entered in the middle: each is one piece.
Where the cuts lie depends on the files and their sizes alone.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.documents import Piece
from jaxgpt.data.reading.folder_files import SourceFile
from jaxgpt.data.reading.opening import COMPRESSED
from jaxgpt.data.reading.rows import holds_json_lines, row_groups
from jaxgpt.data.reading.text_files import is_plain_text
from jaxgpt.shared.tokenizer import ENDOFTEXT

# Bytes of a piece: enough of them for all cores, and not so many that a folder of shards can't be listed.
LEAST_BYTES, MOST_BYTES = 16 << 20, 128 << 20
PIECES = 512
EXPANSION = 4  # bytes of text in a byte of a compressed file, about
_WINDOW_BYTES = 1 << 20
_SEPARATORS = (
    b"\n\n",
    b"\r\n\r\n",
    b"\n",
    b" ",
)  # where a text without <|endoftext|> is cut: the first found


def piece_bytes(total: int, least: int | None = None, most: int | None = None) -> int:
    """Return the bytes of a piece for a source of so many; the limits are LEAST_BYTES and MOST_BYTES."""
    least, most = least or LEAST_BYTES, most or MOST_BYTES
    return min(max(least, total // PIECES), most)


def pieces_of(files: Sequence[SourceFile], in_folder: bool) -> list[Piece]:
    """Return the pieces of local files, in order.

    Args:
      files: of `source_files_of`.
      in_folder: whether a folder was given.
    """
    limit = piece_bytes(sum(file.path.stat().st_size for file in files))
    return [
        piece for file in files for piece in _cut(file, limit, alone=len(files) == 1, in_folder=in_folder)
    ]


def file_piece(path: Path, group: str, kind: str) -> Piece:
    """Return a whole file as a piece."""
    size = path.stat().st_size
    if path.suffix.lower() in (*COMPRESSED, ".parquet"):
        size *= EXPANSION
    return Piece(path=str(path), group=group, kind=kind, size=size)


def _cut(file: SourceFile, limit: int, alone: bool, in_folder: bool) -> list[Piece]:
    whole = dataclasses.replace(file_piece(file.path, file.name, file.kind), alone=alone, in_folder=in_folder)
    suffix, size = file.path.suffix.lower(), file.path.stat().st_size
    if size <= limit or suffix in COMPRESSED or file.kind == "python":
        return [whole]
    if suffix == ".parquet":
        return list(_of_row_groups(whole, limit))
    if file.kind == "table":
        lines = suffix in (".jsonl", ".ndjson", ".json") and holds_json_lines(file.path)
        return list(_ranges(whole, _after(file.path, limit, b"\n"))) if lines else [whole]
    if not is_plain_text(file.path):
        return [whole]
    if suffix == ".txt" and _holds(file.path, ENDOFTEXT.encode()):
        between = _between(file.path, limit, (ENDOFTEXT.encode(),), within=size)
        return list(_ranges(dataclasses.replace(whole, kind="separated"), between))
    if not alone and size <= MOST_BYTES:
        return [whole]  # one document
    between = _between(file.path, limit, _SEPARATORS, within=_WINDOW_BYTES)
    return list(_ranges(dataclasses.replace(whole, alone=True), between))


def _ranges(whole: Piece, cuts: Iterator[tuple[int, int]]) -> Iterator[Piece]:
    """Yield the parts of a file between cuts: where one part ends and where the next begins."""
    size = Path(whole.path).stat().st_size
    found = sorted({(end, begin) for end, begin in cuts if begin < size})
    for begin, end in zip(
        [0, *(begin for _, begin in found)], [*(end for end, _ in found), size], strict=True
    ):
        if begin < end:
            yield dataclasses.replace(whole, begin=begin, end=end, size=end - begin)


def _after(path: Path, limit: int, separator: bytes) -> Iterator[tuple[int, int]]:
    """Yield the places behind the first separator after each multiple of the limit."""
    for _, begin in _between(path, limit, (separator,), within=path.stat().st_size):
        yield begin, begin


def _between(path: Path, limit: int, separators: Sequence[bytes], within: int) -> Iterator[tuple[int, int]]:
    """Yield where a separator that is found after each multiple of the limit begins, and where it ends.

    Without one, the place itself, or the first character that begins behind it.
    """
    size, longest = path.stat().st_size, max(map(len, separators))
    with path.open("rb") as file:
        for nominal in range(limit, size, limit):
            found = None
            for start in range(nominal, min(nominal + within, size), _WINDOW_BYTES):
                file.seek(start)
                window = file.read(_WINDOW_BYTES + longest - 1)
                places = ((window.find(each), each) for each in separators)
                found = next(((start + at, start + at + len(each)) for at, each in places if at >= 0), None)
                if found:
                    break
            if found:
                yield found
            elif within < size:  # a place inside a run without any: at a character's first byte
                file.seek(nominal)
                head = file.read(4)
                at = nominal + next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)
                yield at, at


def _holds(path: Path, wanted: bytes) -> bool:
    """Tell whether a file holds these bytes."""
    with path.open("rb") as file:
        tail = b""
        while chunk := file.read(_WINDOW_BYTES):
            if wanted in tail + chunk:
                return True
            tail = chunk[-len(wanted) + 1 :]
    return False


def _of_row_groups(whole: Piece, limit: int) -> Iterator[Piece]:
    """Yield runs of a table's row groups of about the limit; the whole where they can't be told."""
    sizes = row_groups(Path(whole.path))
    if not sizes:
        yield whole
        return
    begin = 0
    for number, size in enumerate(itertools.accumulate(sizes), 1):
        so_far = size - sum(sizes[:begin])
        if so_far >= limit or number == len(sizes):
            yield dataclasses.replace(whole, begin=begin, end=number, size=so_far)
            begin = number
