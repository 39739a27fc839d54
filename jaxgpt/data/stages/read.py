"""Reads a unit: its documents as bytes, one after the other, and a record of each.

read/00012.text      the documents: UTF-8, or 16-bit tokens of a source that was tokenized
read/00012.records   for each its hash, its place in the split, its length, where its answer begins

What comes after works on parts (`parts_of`): a unit that has more than 128 MB of documents, as a large
compressed file has, is cut between documents, so that all cores share it and shards stay small.

Documents stay in their source's order, but for requests with programs (`--code requests`): those that ask for
one program in several wordings stand side by side in the source, and a model that sees them in one window
learns to copy an answer from the text above it. They are ordered by their hashes.
"""

import dataclasses
import functools
import hashlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.documents import Piece, cleaned, is_validation, place_in_split
from jaxgpt.data.packages import DOCUMENTATION
from jaxgpt.data.reading.pieces import piece_bytes
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
                    if piece.kind in ("table", "hub"):  # elsewhere what stands behind a last separator
                        report.skip("blank documents", piece.path)
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
    # Nothing asks for the documentation beside pairs: it is learned from its first character on.
    without = 0 if piece.kind in DOCUMENTATION else -1
    for document in read_piece(piece, reading_of(work.plan), report):
        text, answer = cleaned(document)
        yield text, place_in_split(document.group), without if answer is None else answer


@dataclasses.dataclass(frozen=True)
class Part:
    """Documents of a unit that are worked on together.

    Attributes:
      unit: its number.
      begin: first document.
      end: behind the last.
    """

    unit: int
    begin: int
    end: int


@functools.lru_cache(1)
def parts_of(work: Work) -> list[Part]:
    """Return the parts of all units, in order; the stage "read" is done."""
    found = []
    sizes = work.plan["part_bytes"]
    limit = piece_bytes(sum(summary["bytes"] for summary in work.summaries("read")), **sizes)
    for unit, summary in enumerate(work.summaries("read")):
        count, cuts = summary["documents"], []
        if summary["bytes"] > sizes["most"]:
            ends = np.cumsum(records_of(work, unit)["bytes"])
            whole = np.arange(limit, int(ends[-1]), limit, dtype=np.uint64)
            cuts = np.unique(np.searchsorted(ends, whole) + 1).tolist()
        edges = [0, *(cut for cut in cuts if cut < count), count]
        found += [Part(unit, begin, end) for begin, end in itertools.pairwise(edges)]
    return found


def part_summaries(work: Work, stage: str) -> list[dict[str, Any]]:
    """Return the summaries of a stage that has a task a part."""
    return [work.summary(stage, number) for number in range(len(parts_of(work)))]


@dataclasses.dataclass(frozen=True)
class PartDocuments:
    """The documents of a part when duplicates are known.

    Attributes:
      path: of the file that holds them.
      first_byte: where the first of them begins in it.
      records: (N,), of RECORD.
      kept: (N,), whether it is no duplicate.
      val: (N,), whether it is in validation.
    """

    path: Path
    first_byte: int
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
        ends = self.first_byte + np.cumsum(self.records["bytes"])
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


def documents_of(work: Work, number: int) -> PartDocuments:
    """Return the documents of a part; the stage "duplicates" is done."""
    part = parts_of(work)[number]
    unit = records_of(work, part.unit)
    kept = np.ones(len(unit), np.bool_)
    for hashes in range(duplicate_parts(work)):
        dropped = np.load(work.path("duplicates", hashes, ".npy"), "r")
        begin, end = np.searchsorted(dropped["unit"], [part.unit, part.unit + 1])
        kept[dropped["position"][begin:end]] = False
    records = unit[part.begin : part.end]
    val = is_validation(np.asarray(records["place"]), float(work.plan["val_fraction"]))
    path, first_byte = work.path("read", part.unit, ".text"), int(unit["bytes"][: part.begin].sum())
    return PartDocuments(path, first_byte, records, kept[part.begin : part.end], val)


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
