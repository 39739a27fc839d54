"""Keeps requests that a model will be asked out of the text that it is trained on.

jaxgpt prepare --source stdlib --code requests --held-out asked.txt --out data/requests
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxgpt.data.documents import Document
from jaxgpt.data.report import ReadReport
from jaxgpt.data.requests.wording import normalized_request
from jaxgpt.shared.errors import UserError

REASON = "pairs whose request is held out"  # or another one of the same program
DEFINES = "documents that define a function of which a request is held out"
_FUNCTION = re.compile(r"\bdef\s+(\w+)")


def read_held_out(path: Path) -> frozenset[str]:
    """Return the requests of a text file, one a line, normalized.

    Raises:
      UserError: it can't be read, or a line has no word that tells it from other requests.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--held-out {path} can't be read ({error}); give a text, a request a line") from None
    found = {line.strip(): normalized_request(line) for line in lines if line.strip()}
    if not found:
        raise UserError(f"--held-out {path} has no request; give one a line")
    if empty := next((line for line, words in found.items() if not words), None):
        raise UserError(f"--held-out {path}: {empty!r} says nothing that a request asks for; name the task")
    return frozenset(found.values())


def without_held_out(
    documents: Iterable[Document], held_out: frozenset[str], report: ReadReport, *, several: bool = False
) -> Iterator[Document]:
    """Yield the documents, but for programs of which a request is held out; those are counted in the report.

    A request is held out that asks for the same, or for less: whose content words are all among those of one
    that is held out ("count words" beside "count the words in a text").

    Args:
      documents: pairs.
      held_out: of `read_held_out`.
      report: gains what is left out.
      several: requests of one program follow each other; where one asks what is held out, the others ask for
        the same. Of a table two rows may share an answer and nothing else.

    Raises:
      UserError: a document is no pair, so that nothing tells what it asks for.
    """
    words = [frozenset(each.split()) for each in held_out]
    groups = (list(group) for _, group in itertools.groupby(documents, _answer))
    for pairs in groups if several else ([pair] for pair in documents if _answer(pair) is not None):
        asked = [pair for pair in pairs if _is_held_out(_request(pair), words)]
        if not asked:
            yield from pairs
        for pair in pairs if asked else ():
            report.skip(REASON, _request(pair))


def texts_without_held_out(
    documents: Iterable[Document], held_out: frozenset[str], report: ReadReport
) -> Iterator[Document]:
    """Yield texts that are no pairs, but for those that define a function whose name asks the same."""
    words = [frozenset(each.split()) for each in held_out]
    for document in documents:
        names = (name.replace("_", " ") for name in _FUNCTION.findall(document.text))
        if any(_is_held_out(name, words) for name in names):
            report.skip(DEFINES, document.group)
        else:
            yield document


def _is_held_out(request: str, held_out: Sequence[frozenset[str]]) -> bool:
    asked = set(normalized_request(request).split())
    return bool(asked) and any(asked <= each for each in held_out)


def _request(pair: Document) -> str:
    return pair.text[: pair.answer].strip()


def _answer(document: Document) -> str:
    if document.answer is None:
        raise UserError(
            f"--held-out needs pairs, and {document.text[:40]!r}... is none; give .py files, or a table "
            "with a --template of several columns, the answer last"
        )
    return document.text[document.answer :]
