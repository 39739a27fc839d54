r"""Which columns of a row make a document: one of text, or several through a template.

    --text-column body
    --template '{instruction}\n{output}'

The last column of a template is the answer of a pair.
"""

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxgpt.data.documents import Document, cut_at_endoftext
from jaxgpt.shared.errors import UserError

DEFAULT_COLUMN = "text"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


class NotTextError(ValueError):
    """A column holds something else than text; the message names column and type."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What makes a document of a row.

    Attributes:
      parts: text and the column that follows it (None at the end), in order.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def one(cls, name: str) -> "Columns":
        """Take a column as it is."""
        return cls((("", name),))

    @classmethod
    def of_template(cls, template: str) -> "Columns":
        r"""Read a template: {NAME} stands for a column, \n and \t for line end and tab, {{ for a brace.

        Raises:
          UserError: it is none, or names no column.
        """
        text = re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], template)
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"--template {template!r}: {error}; write {{NAME}} for a column") from None
        if any(name == "" or form or conversion for _, name, form, conversion in parsed):
            raise UserError(f"--template {template!r}: write {{NAME}} for a column, and nothing else in it")
        columns = cls(tuple((literal, name) for literal, name, _, _ in parsed))
        if not columns.names:
            raise UserError(f"--template {template!r} names no column; write {{NAME}} for one")
        return columns

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the text."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    @property
    def answer(self) -> str | None:
        """The column of a pair's answer: the last of several."""
        return self.names[-1] if len(self.names) > 1 else None

    @property
    def is_plain(self) -> bool:
        """Whether a document is a column as it is."""
        return self.parts == (("", self.names[0]),)

    def documents(self, row: Mapping[str, Any]) -> Iterator[Document]:
        """Yield a row's document; several where <|endoftext|> is written in it, none where text is missing.

        The last column of a template must hold text that is not blank, the others may be empty.

        Raises:
          NotTextError: a column holds something else than text.
        """
        last = row.get(self.names[-1])
        if last is None or (not self.is_plain and isinstance(last, str) and not last.strip()):
            return
        text, answer = "", None
        for literal, name in self.parts:
            text += literal
            if name is None:
                continue
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                raise NotTextError(f"column {name!r} holds {type(value).__name__}, no text")
            if name == self.answer:
                answer = len(text)
            text += value or ""
        yield from cut_at_endoftext(Document(text, text, answer))


def guess_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column that holds the most characters of text; None where none holds any."""
    sizes: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                sizes[name] = sizes.get(name, 0) + len(value)
    return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else None
