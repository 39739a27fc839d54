"""Documents, the unit of the split: which texts are kept, and which of them are validation."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

OFFLINE_CHOICES = "offline choices: --source stdlib, --source packages:NAME,..., or a local file or folder"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is never cut by the split.

    Attributes:
      text: what is trained on.
      group: documents of one group fall into the same split: the file for code, else the document.
    """

    text: str
    group: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents, with where they came from.

    Attributes:
      name: the --source that was given.
      revision: commit, version or file list that tells which text it was.
      documents: read as they are asked for.
    """

    name: str
    revision: str
    documents: Iterable[Document]


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
        kept.append(Document(text.decode(), document.group))
    return kept


def split(documents: Sequence[Document], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split by group: a group is in validation when its hash, read as a number in [0, 1), is below the share.

    A document's split depends on nothing but its own group: preparing with more data never moves it from
    training to validation.

    Returns:
      The texts of training and of validation.
    """
    train: list[str] = []
    val: list[str] = []
    for document in documents:
        digest = hashlib.sha256(document.group.encode("utf-8", "replace")).digest()
        in_val = int.from_bytes(digest[:8], "big") / 2**64 < val_fraction
        (val if in_val else train).append(document.text)
    return train, val
