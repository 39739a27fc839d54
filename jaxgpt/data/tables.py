"""Reads tables (.jsonl, .json, .parquet, local or on the hub): each row's text column becomes a document.

Local JSON, which may be compressed, is read by Python's own parser, .jsonl line by line; Parquet and the
hub's files are read by `datasets`.
"""

import glob
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.documents import Document
from jaxgpt.data.text_files import kind_of, open_text
from jaxgpt.shared.errors import UserError

TABLE_SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference


def local_table_documents(path: Path, text_column: str) -> Iterator[Document]:
    """Yield the rows of a .jsonl, .json or .parquet file, the first two perhaps compressed.

    Raises:
      UserError: it is damaged or empty, or has no such column of text.
    """
    if kind_of(path) == ".parquet":
        yield from table_documents(load_table([str(path)]), text_column, str(path))
        return
    with open_text(path) as file:
        yield from row_documents(_json_rows(path, file), text_column, str(path))


def _json_rows(path: Path, file: io.TextIOWrapper) -> Iterator[Any]:
    """Yield the rows of an open file: .json holds a list of objects, an object of columns, or lines."""
    lines: Iterable[str] = file
    if kind_of(path) == ".json":
        text = file.read()
        try:
            value = json.loads(text)
        except ValueError:  # several lines, or damaged
            lines = text.splitlines()
        else:
            is_columns = isinstance(value, dict) and all(isinstance(each, list) for each in value.values())
            columns = zip(*value.values(), strict=False) if is_columns else ()
            rows = value if isinstance(value, list) else [value]
            yield from (dict(zip(value, row, strict=True)) for row in columns) if is_columns else rows
            return
    empty = True
    for number, line in enumerate(lines, 1):
        if line.strip():
            empty = False
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is no readable json table: line {number}: {error}") from None
    if empty:
        raise UserError(f"{path} is empty; give a json table with text in it")


def row_documents(rows: Iterable[Any], text_column: str, where: str) -> Iterator[Document]:
    """Yield a document for each row of a JSON table; each is its own group.

    Raises:
      UserError: the first row has no such column, or another row no text in it, or is no object.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where} row {number} is a {type(row).__name__}, expected an object with a text")
        if not number:
            _require_column(text_column, list(row), where)
        yield _document(row.get(text_column), number, text_column, where)


def load_table(data_files: Sequence[str]) -> Any:
    """Open .json, .jsonl or .parquet files (or hub paths of such) with `datasets`, as one table."""
    import datasets  # slow to import

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log, our own line says
    datasets.disable_progress_bars()
    kind = "parquet" if data_files[0].endswith(".parquet") else "json"
    try:
        return datasets.load_dataset(kind, data_files=[_escaped(f) for f in data_files], split="train")
    except StopIteration:  # files without a byte
        raise UserError(f"{data_files[0]} is empty; give a {kind} table with text in it") from None
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0][:200]
        raise UserError(f"{data_files[0]} is no readable {kind} table: {cause}") from None


def _escaped(file: str) -> str:
    """Keep `datasets` from reading brackets and stars in a local path as a pattern."""
    return file if file.startswith("hf://") else glob.escape(file)


def table_documents(table: Any, text_column: str, where: str) -> Iterator[Document]:
    """Yield the rows of a table; each is its own group.

    Raises:
      UserError: there is no such column, or it does not hold text.
    """
    _require_column(text_column, table.column_names, where)
    for number, text in enumerate(table[text_column]):
        yield _document(text, number, text_column, where)


def _require_column(text_column: str, columns: Sequence[str], where: str) -> None:
    if text_column not in columns:
        raise UserError(
            f"{where} has no column {text_column!r}; it has {', '.join(columns)}; name one with --text-column"
        )


def _document(text: Any, number: int, text_column: str, where: str) -> Document:
    if not isinstance(text, str):
        raise UserError(f"{where} row {number}: column {text_column!r} holds {type(text).__name__}, no text")
    return Document(text, text)
