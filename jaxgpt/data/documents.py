"""Documents, the unit of the split: which texts are kept, and which of them are validation."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

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


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, with where they came from.

    Attributes:
      name: the --source that was given.
      revision: commit, version or file list that tells which text it was.
      documents: read as they are asked for.
      report: what was left out, complete when the documents are read.
    """

    name: str
    revision: str
    documents: Iterable[Document]
    report: ReadReport = dataclasses.field(default_factory=ReadReport)


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


def deduplicate(documents: Iterable[Document], counts: Counter[str]) -> list[Document]:
    """Keep the first of equal documents, drop blank ones, and replace what UTF-8 can't hold.

    Args:
      documents: iterable of Document.
      counts: gains "documents_read", "blank" and "duplicates".

    Returns:
      The documents that are kept, their text without white space at both ends, in order.
    """
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        counts["documents_read"] += 1
        text = document.text.strip().encode("utf-8", "replace")
        if not text:
            counts["blank"] += 1
            continue
        digest = hashlib.sha256(text).digest()
        if digest in seen:
            counts["duplicates"] += 1
            continue
        seen.add(digest)
        kept.append(Document(text.decode(), document.group, _answer_after_strip(document)))
    return kept


def _answer_after_strip(document: Document) -> int | None:
    if document.answer is None:
        return None
    before = len(document.text) - len(document.text.lstrip())
    return min(max(document.answer - before, 0), len(document.text.strip()))


def place_in_split(group: str) -> float:
    """Return a group's place in [0, 1): it is in validation when this is below --val-fraction."""
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split by group: a group is in validation when its hash, read as a number in [0, 1), is below the share.

    A document's split depends on nothing but its own group: preparing with more data never moves it from
    training to validation.

    Returns:
      The documents of training and of validation.
    """
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        (val if place_in_split(document.group) < val_fraction else train).append(document)
    return train, val


def working_fraction(documents: Sequence[Document]) -> float | None:
    """Return the least --val-fraction, of two digits, that leaves no split empty; None where none does."""
    places = sorted({place_in_split(document.group) for document in documents})
    if len(places) < 2:
        return None
    for digits in range(1, 18):
        step = 10.0**-digits
        fraction = round((places[0] // step + 1) * step, digits)
        if places[0] < fraction <= places[-1] and fraction < 2 * places[0] + step:
            return fraction
    return None
