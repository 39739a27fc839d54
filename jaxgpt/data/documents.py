"""Documents, the unit of the split: which texts are kept, and which of them are validation."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.data.report import ReadReport
from jaxgpt.shared.tokenizer import ENDOFTEXT

OFFLINE_CHOICES = "offline choices: --source stdlib, --source packages:NAME,..., or a local file or folder"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is never cut by the split.

    Attributes:
      text: what is trained on.
      group: documents of one group fall into the same split: the file for code, else the document.
      answer: of a pair, where its answer begins in the text, in characters; None where it is no pair.
    """

    text: str
    group: str
    answer: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a source that is read by itself: a file, or a range of a large one.

    Attributes:
      path: the file, or its address on the hub.
      group: what documents of code are grouped by: the file's name.
      kind: how it is read; see sources.py.
      begin: first byte (of .parquet, row group) of the range.
      end: where the range ends; None for the end of the file.
      size: bytes of text, about; 0 where that is unknown.
      alone: whether a text is cut into blocks, as one that is the only file.
      in_folder: whether a file that is no table is left out instead of being an error.
    """

    path: str
    group: str
    kind: str
    begin: int = 0
    end: int | None = None
    size: int = 0
    alone: bool = False
    in_folder: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, with where they came from.

    Attributes:
      name: the --source that was given.
      revision: commit, version or file list that tells which text it was.
      pieces: what it consists of, in order.
      read: yields the documents of a piece and counts what it leaves out.
      report: what was left out, complete when the documents are read.
    """

    name: str
    revision: str
    pieces: Sequence[Piece]
    read: Callable[[Piece, ReadReport], Iterator[Document]]
    report: ReadReport = dataclasses.field(default_factory=ReadReport)

    @property
    def documents(self) -> Iterator[Document]:
        """The documents, read as they are asked for."""
        for piece in self.pieces:
            yield from self.read(piece, self.report)


def cut_at_endoftext(document: Document) -> Iterator[Document]:
    """Yield the documents that <|endoftext|>, written out in a text, separates; blank ones are left out.

    Each is its own group. A document without it is yielded as it is.
    """
    if ENDOFTEXT not in document.text:
        yield document
        return
    begin = 0
    for part in document.text.split(ENDOFTEXT):
        if part.strip():
            answer = None if document.answer is None else min(max(document.answer - begin, 0), len(part))
            yield Document(part, part, answer)
        begin += len(part) + len(ENDOFTEXT)


def cleaned(document: Document) -> tuple[bytes, int | None]:
    """Clean a document: no white space at both ends, what UTF-8 can't hold replaced.

    Returns:
      The text, empty for a blank document, and where its answer begins in it, in characters.
    """
    text = document.text.strip()
    answer = document.answer
    if answer is not None:
        before = len(document.text) - len(document.text.lstrip())
        answer = min(max(answer - before, 0), len(text))
    return text.encode("utf-8", "replace"), answer


def place_in_split(group: str | bytes) -> int:
    """Return a group's place in [0, 2^64): it is in validation when this / 2^64 is below --val-fraction.

    It depends on nothing but the group: preparing with more data never moves a document from training to
    validation.
    """
    data = group if isinstance(group, bytes) else group.encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def is_validation(places: npt.NDArray[np.uint64], val_fraction: float) -> npt.NDArray[np.bool_]:
    """Tell which places lie in validation."""
    return places.astype(np.float64) / 2**64 < val_fraction


def working_fraction(least: float, most: float) -> float | None:
    """Return the least --val-fraction, of two digits, that leaves no split empty; None where none does.

    Args:
      least: the least place of a group in [0, 1).
      most: the largest.
    """
    for digits in range(1, 18):
        step = 10.0**-digits
        fraction = round((least // step + 1) * step, digits)
        if least < fraction <= most and fraction < 2 * least + step:
            return fraction
    return None
