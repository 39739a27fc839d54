"""Tables (.jsonl, .json, .csv, .tsv, .parquet, .arrow, local or on the hub): each row becomes a document."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.documents import Document
from jaxgpt.data.reading.columns import DEFAULT_COLUMN, Columns, NotTextError, guess_column
from jaxgpt.data.reading.opening import uncompressed_name
from jaxgpt.data.reading.rows import Row, no_column, read_rows
from jaxgpt.data.report import ReadReport
from jaxgpt.shared.errors import UserError

GUESSED_ROWS = 100  # on which the column of a .csv is guessed
HELD_CHARACTERS = 2**24  # of rows that are kept back until each column of a template was seen
HUB = "hf://"


def local_table_documents(
    path: Path,
    columns: str | Columns,
    report: ReadReport | None = None,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[Document]:
    """Yield the rows of a table file; see `table_documents`.

    Args:
      path: .jsonl, .json, .csv, .tsv, .parquet or .arrow, perhaps compressed.
      columns: column that holds the text, or a template; of .csv and .tsv a missing `text` is guessed.
      report: gains what is left out.
      begin: where the range of it begins that is read; see `read_rows`.
      end: where that range ends.
    """
    report = report or ReadReport()
    chosen = Columns.one(columns) if isinstance(columns, str) else columns
    suffix = Path(uncompressed_name(path)).suffix.lower()
    names = chosen.names if suffix in (".parquet", ".arrow") else ()
    rows = read_rows(path, report, names, begin, end)
    guess, first = suffix in (".csv", ".tsv"), not begin
    yield from table_documents(rows, chosen, str(path), report, guess, first)


def load_table(data_files: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of table files (.jsonl, .json, .parquet) of one kind, of the hub (hf://) or local."""
    if data_files[0].startswith(HUB):
        yield from _hub_rows(data_files)
        return
    for file in data_files:
        yield from read_rows(Path(file), ReadReport())


def _hub_rows(data_files: Sequence[str]) -> Iterator[Row]:
    """Open hub paths with `datasets`, as one table."""
    import datasets  # slow to import

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log, our own line says
    datasets.disable_progress_bars()
    kind = "parquet" if data_files[0].endswith(".parquet") else "json"
    try:
        table: Any = datasets.load_dataset(kind, data_files=list(data_files), split="train")
    except StopIteration:  # files without a byte
        raise UserError(f"{data_files[0]} is empty; give a {kind} table with text in it") from None
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0][:200]
        raise UserError(f"{data_files[0]} is no readable {kind} table: {cause}") from None
    for number, row in enumerate(table):
        yield f"{data_files[0]} row {number}", row


def table_documents(
    table: Iterable[Row],
    columns: str | Columns,
    where: str,
    report: ReadReport | None = None,
    guess: bool = False,
    first: bool = True,
) -> Iterator[Document]:
    """Yield the rows of a table; each is its own group. Rows without text are counted and left out.

    Args:
      table: rows with their places.
      columns: column that holds the text, or a template.
      where: the table, for messages.
      report: gains what is left out.
      guess: where there is no column `text`, take the one with the most text, and say so.
      first: whether these are the table's first rows: in a later part all may lack the column.

    Raises:
      NoTableError: there is no such column; of a table of less than HELD_CHARACTERS no row was yielded.
      UserError: one does not hold text, and errors are not skipped.
    """
    report = report or ReadReport()
    chosen = Columns.one(columns) if isinstance(columns, str) else columns
    rows = iter(table)
    if guess:
        head = list(itertools.islice(rows, GUESSED_ROWS))
        chosen = _guessed(chosen, head, where, report)
        rows = itertools.chain(head, rows)
    missing, found = set(chosen.names), dict[str, None]()
    empty = ReadReport()  # is told once it is clear that the rows are of such a table
    held: list[Document] = []  # of a table that may turn out to be none
    room = HELD_CHARACTERS if first else 0
    for place, row in rows:
        if missing:
            missing -= row.keys()
            found |= dict.fromkeys(row)
        try:
            documents = list(chosen.documents(row))
        except NotTextError as error:
            report.damaged(f"{place}: {error}; take another column", "rows whose column is no text", place)
            continue
        if not documents:
            empty.skip("rows without text", place)
        room -= sum(len(document.text) for document in documents)
        if missing and room > 0:
            held += documents
        else:
            yield from [*held, *documents]
            held.clear()
    if missing and found and first:
        name = next(name for name in chosen.names if name in missing)
        raise no_column(where, name, found)
    report.add(empty)


def _guessed(columns: Columns, head: Sequence[Row], where: str, report: ReadReport) -> Columns:
    rows = [row for _, row in head]
    if columns != Columns.one(DEFAULT_COLUMN) or not rows or any(DEFAULT_COLUMN in row for row in rows):
        return columns
    name = guess_column(rows)
    if name is None:
        return columns
    report.notes.append(f"{where}: no column {DEFAULT_COLUMN!r}, so column {name!r}, which has the most text")
    return Columns.one(name)
