"""Reads a unit: its documents as bytes, one after the other, and a record of each.

read/00012.text      the documents: UTF-8, or 16-bit tokens of a source that was tokenized
read/00012.records   for each its hash, its place in the split, its length, where its answer begins

Documents stay in their source's order, but for requests with programs (`--code requests`): those that ask for
one program in several wordings stand side by side in the source, and a model that sees them in one window
learns to copy an answer from the text above it. They are ordered by their hashes.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.documents import Piece, cleaned, is_validation, place_in_split
from jaxgpt.data.reading.token_files import split_of, token_documents
from jaxgpt.data.report import ReadReport
from jaxgpt.data.sources import read_piece
from jaxgpt.data.work.plan import reading_of
from jaxgpt.data.work.work_folder import Advance, Stage, Work
from jaxgpt.shared.dataset.shards import map_file
from jaxgpt.shared.files import new_file

# A document: 16 bytes of its hash, its group's place in the split, bytes, and the character at which its
# answer begins, -1 for none.
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8"), ("bytes", "<u8"), ("answer", "<i8")])
_PACKED = struct.Struct("<16sQQq")
_PLACES = {"val": 0, "train": 2**64 - 1}  # of documents whose file says in which split they are

Kept = tuple[bytes, int, int]  # a document, its place, where its answer begins


def read_unit(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write the documents of a unit; return what was read and left out."""
    report = ReadReport(bool(work.plan["reading"]["skip_errors"]))
    records, read, blank, size = bytearray(), 0, 0, 0
    scattered: list[tuple[bytes, Kept]] | None = [] if work.plan["reading"]["code"] == "requests" else None
    with new_file(work.path("read", number, ".text")) as path, path.open("wb") as file:

        def write(digest: bytes, kept: Kept) -> None:
            text, place, answer = kept
            file.write(text)
            records.extend(_PACKED.pack(digest, place, len(text), answer))

        for piece in work.units[number]:
            done = 0
            for text, place, answer in _documents(work, piece, report):
                read += 1
                if not text:
                    blank += 1
                    continue
                digest = hashlib.sha256(text).digest()[:16]
                if scattered is None:
                    write(digest, (text, place, answer))
                else:
                    scattered.append((digest, (text, place, answer)))
                done += len(text)
                advance(min(len(text), max(piece.size - done, 0)))
            size += done
            advance(max(piece.size - done, 0))
        for digest, kept in sorted(scattered or ()):
            write(digest, kept)
    with new_file(work.path("read", number, ".records")) as path:
        path.write_bytes(records)
    return {
        "documents_read": read,
        "blank": blank,
        "documents": read - blank,
        "bytes": size,
        "report": report.to_json(),
    }


def _documents(work: Work, piece: Piece, report: ReadReport) -> Iterator[Kept]:
    if piece.kind == "tokens":
        fixed = _PLACES.get(split_of(Path(piece.path)) or "")
        for tokens in token_documents(piece, **work.plan["tokens"]):
            if len(tokens):
                text = tokens.tobytes()
                yield text, place_in_split(text) if fixed is None else fixed, -1
        return
    for document in read_piece(piece, reading_of(work.plan), report):
        text, answer = cleaned(document)
        yield text, place_in_split(document.group), -1 if answer is None else answer


@dataclasses.dataclass(frozen=True)
class UnitDocuments:
    """The documents of a unit when duplicates are known.

    Attributes:
      path: of the file that holds them.
      records: (N,), of RECORD.
      kept: (N,), whether it is no duplicate.
      val: (N,), whether it is in validation.
    """

    path: Path
    records: npt.NDArray[Any]
    kept: npt.NDArray[np.bool_]
    val: npt.NDArray[np.bool_]

    def of(self, split: str) -> npt.NDArray[np.intp]:
        """Return which documents a split keeps."""
        return np.flatnonzero(self.kept & (self.val if split == "val" else ~self.val))

    def batches(
        self, wanted: npt.NDArray[np.intp], batch_bytes: int
    ) -> Iterator[tuple[npt.NDArray[np.intp], list[bytes]]]:
        """Yield some documents, about so many bytes at a time, with their numbers."""
        ends = np.cumsum(self.records["bytes"])
        begins = ends - self.records["bytes"]
        with self.path.open("rb") as file:
            for part in _cut_by_size(wanted, self.records["bytes"][wanted], batch_bytes):
                texts = []
                for number in part.tolist():
                    file.seek(int(begins[number]))
                    texts.append(file.read(int(self.records["bytes"][number])))
                yield part, texts


def _cut_by_size(
    numbers: npt.NDArray[np.intp], sizes: npt.NDArray[np.uint64], limit: int
) -> Iterator[npt.NDArray[np.intp]]:
    begin, total = 0, 0
    for at, size in enumerate(sizes.tolist(), 1):
        total += size
        if total >= limit or at == len(numbers):
            yield numbers[begin:at]
            begin, total = at, 0


def records_of(work: Work, number: int) -> npt.NDArray[Any]:
    """Map the records of a unit that was read."""
    return map_file(work.path("read", number, ".records"), RECORD)


def documents_of(work: Work, number: int) -> UnitDocuments:
    """Return the documents of a unit; the stage "duplicates" is done."""
    records = records_of(work, number)
    kept = np.ones(len(records), np.bool_)
    for part in range(duplicate_parts(work)):
        dropped = np.load(work.path("duplicates", part, ".npy"), "r")
        begin, end = np.searchsorted(dropped["unit"], [number, number + 1])
        kept[dropped["position"][begin:end]] = False
    val = is_validation(np.asarray(records["place"]), float(work.plan["val_fraction"]))
    return UnitDocuments(work.path("read", number, ".text"), records, kept, val)


PART_DOCUMENTS = 1 << 20  # whose hashes are sorted at a time: 80 MB


def duplicate_parts(work: Work) -> int:
    """Return into how many parts, by their first bits, hashes are sorted: a power of two."""
    documents = sum(summary["documents"] for summary in work.summaries("read"))
    return 1 << max(0, -(-documents // PART_DOCUMENTS) - 1).bit_length()


READ = Stage(
    name="read",
    count=lambda work: len(work.units),
    run=read_unit,
    files=(".text", ".records"),
    size=lambda work, number: sum(piece.size for piece in work.units[number]),
    title="reading",
)
