"""Rows of table files, read as they are asked for: .jsonl, .json, .csv, .tsv, .parquet, .arrow.

Only the columns that are asked for are typed: another column may hold a number here and a text there.
"""

import codecs
import csv
import functools
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.data.reading.opening import open_file, uncompressed_name
from jaxgpt.data.report import ReadReport
from jaxgpt.shared.errors import UserError

# Where it stands (str() of it, for messages), and its columns.
Row = tuple[object, Mapping[str, Any]]
ARROW_ROWS = 1000  # read at a time
_COUNTED_BYTES = 1 << 22


class NoTableError(UserError):
    """A file is no table, or has none of the columns that were asked for."""


def no_column(where: str, name: str, columns: Iterable[str]) -> NoTableError:
    """Return the error that names the columns that there are."""
    return NoTableError(
        f"{where} has no column {name!r}; it has {', '.join(columns) or 'none'}; name one with --text-column "
        "or --template"
    )


class Line(NamedTuple):
    """A line of a file, counted from where the reading began; those before are counted when it is told."""

    path: Path
    begin: int
    number: int

    def __str__(self) -> str:
        return f"{self.path} line {lines_before(self.path, self.begin) + self.number}"


@functools.cache
def lines_before(path: Path, begin: int) -> int:
    """Count the lines of a file before a byte."""
    if not begin:
        return 0
    with path.open("rb") as file:
        blocks = range(0, begin, _COUNTED_BYTES)
        return sum(file.read(min(_COUNTED_BYTES, begin - at)).count(b"\n") for at in blocks)


def read_rows(
    path: Path, report: ReadReport, names: Sequence[str] = (), begin: int = 0, end: int | None = None
) -> Iterator[Row]:
    """Yield the rows of a table file.

    Args:
      path: its name tells its format; it may be compressed.
      report: gains the rows that are damaged and left out.
      names: of the columns that are needed; a format that stores columns apart reads these alone.
      begin: of JSON lines the byte at which the first line begins; of .parquet a row group.
      end: where the range ends; None for the end of the file.

    Raises:
      NoTableError: it holds something else.
      UserError: a part of it is damaged and errors are not skipped.
    """
    suffix = Path(uncompressed_name(path)).suffix.lower()
    if not path.stat().st_size:
        raise _empty(path, suffix)
    if suffix in (".parquet", ".arrow"):
        yield from _arrow_rows(path, suffix, report, names, (begin, end))
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, suffix, report)
    else:
        with open_file(path) as file:
            yield from _json_rows(path, file, report, begin, end)


def _empty(path: Path, suffix: str) -> NoTableError:
    kind = "json" if suffix in (".json", ".jsonl", ".ndjson") else suffix.removeprefix(".")
    return NoTableError(f"{path} is empty; give a {kind} table with text in it")


def _json_rows(
    path: Path, file: io.BufferedReader, report: ReadReport, begin: int, end: int | None
) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON value: a list of rows or of texts, a row, or columns."""
    first, line = 1, b""
    if begin:
        file.seek(begin)
    lines: Iterable[bytes] = file if end is None else _lines_until(file, end - begin)
    if not begin:
        first, line = _first_line(lines)
        if not line:
            raise _empty(path, ".json")
        if line.lstrip().startswith(b"[") or (_may_be_one_value(path) and not _is_json(line)):
            yield from _rows_of_value(path, line + file.read())
            return
        if _may_be_one_value(path) and _holds_columns(line):
            rest = b"".join(lines)
            if not rest.strip():
                yield from _rows_of_value(path, line)
                return
            lines = io.BytesIO(rest)
        lines = itertools.chain([line], lines)
    for number, each in enumerate(lines, first):
        if not each.strip():
            continue
        where = Line(path, begin, number)
        try:
            row = json.loads(each)
        except UnicodeDecodeError as error:
            report.damaged(
                f"{where} is not UTF-8 text ({error}); convert it", "lines that are not UTF-8", where
            )
        except (ValueError, RecursionError) as error:
            place = str(where).removeprefix(f"{path} ")
            message = f"{path} is no readable json table: {place}: {error}; mend it"
            report.damaged(message, "lines that are no JSON", where)
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                message = f"{where} is a JSON {type(row).__name__}, expected an object; mend it"
                report.damaged(message, "lines that are no JSON object", where)


def _first_line(lines: Iterable[bytes]) -> tuple[int, bytes]:
    """Return number and content of the first line that is not blank; no content where there is none."""
    for number, each in enumerate(lines, 1):
        line = each.removeprefix(codecs.BOM_UTF8) if number == 1 else each
        if line.strip():
            return number, line
    return 1, b""


def _lines_until(file: io.BufferedReader, count: int) -> Iterator[bytes]:
    """Yield lines until so many bytes were read."""
    while count > 0 and (line := file.readline()):
        count -= len(line)
        yield line


def holds_json_lines(path: Path) -> bool:
    """Tell whether a .json or .jsonl file is read line by line, and not as one value."""
    with open_file(path) as file:
        _, line = _first_line(file)
    return not line.lstrip().startswith(b"[") and (not _may_be_one_value(path) or _is_json(line))


def row_groups(path: Path) -> list[int]:
    """Return the bytes of each row group of a .parquet; an empty list where it can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError):
        return []
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def _may_be_one_value(path: Path) -> bool:
    """Whether a file may be one JSON value over several lines."""
    return uncompressed_name(path).lower().endswith(".json")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _holds_columns(line: bytes) -> bool:
    """Whether a line is an object of lists."""
    value = json.loads(line) if _is_json(line) else None
    return isinstance(value, dict) and bool(value) and all(isinstance(each, list) for each in value.values())


def _rows_of_value(path: Path, content: bytes) -> Iterator[Row]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NoTableError(f"{path} is no readable json table: {error}") from None
    if isinstance(value, dict):
        columns = value.values()
        if all(isinstance(column, list) for column in columns) and len({len(c) for c in columns}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(row, dict | str) for row in value):
        raise NoTableError(f"{path} is no readable json table: expected a list of objects")
    for number, row in enumerate(value):
        yield f"{path} row {number}", {"text": row} if isinstance(row, str) else row


def _csv_rows(path: Path, suffix: str, report: ReadReport) -> Iterator[Row]:
    """Yield the rows of a table of separated values, whose first line names the columns.

    The separator of a .tsv is a tab; of a .csv a comma, or a semicolon where the first line has no comma.
    """
    csv.field_size_limit(sys.maxsize)
    with open_file(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader: Any = csv.reader(())
        try:
            first = text.readline()
            comma = ";" if ";" in first and "," not in first else ","
            lines = itertools.chain([first], text)
            reader = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else comma, strict=True)
            names: list[str] = next(reader, [])
            for row in reader:
                if not row:
                    continue
                where = f"{path} line {reader.line_num}"
                if len(row) == len(names):
                    yield where, dict(zip(names, row, strict=True))
                else:
                    message = (
                        f"{where} ends a row of {len(row)} values, the first line names {len(names)}; mend it"
                    )
                    report.damaged(message, "rows with another number of values", where)
        except (csv.Error, UnicodeDecodeError) as error:
            message = (
                f"{path} is no readable {suffix[1:]} table after line {reader.line_num} ({error}); mend it"
            )
            report.damaged(message, f"{suffix} files that end early", str(path))


def _arrow_rows(
    path: Path, suffix: str, report: ReadReport, names: Sequence[str], groups: tuple[int, int | None]
) -> Iterator[Row]:
    import pyarrow as pa  # slow to import

    number = 0
    try:
        for first, batch in _arrow_batches(path, suffix, names, groups):
            number = max(number, first)
            columns = {name: _values(batch.column(name)) for name in names or batch.schema.names}
            for row in zip(*columns.values(), strict=True):
                where = f"{path} row {number}"
                number += 1
                if any(isinstance(value, UnicodeDecodeError) for value in row):
                    message = f"{where} is not UTF-8; convert it"
                    report.damaged(message, "rows that are not UTF-8", where)
                else:
                    yield where, dict(zip(columns, row, strict=True))
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NoTableError(f"{path} is no readable {suffix[1:]} table: {cause}") from None


def _arrow_batches(
    path: Path, suffix: str, names: Sequence[str], groups: tuple[int, int | None]
) -> Iterator[tuple[int, Any]]:
    """Yield batches of rows, each with the number of the first row that is read at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def check(columns: Sequence[str]) -> None:
        for name in names:
            if name not in columns:
                raise no_column(str(path), name, columns)

    with open_file(path) as file:
        if suffix == ".parquet":
            table = pq.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
            check(table.schema_arrow.names)
            counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            begin, end = groups[0], table.num_row_groups if groups[1] is None else groups[1]
            batches = table.iter_batches(ARROW_ROWS, range(begin, end), columns=list(names) or None)
            yield from ((sum(counts[:begin]), batch) for batch in batches)
        else:
            stream = pa.ipc.open_stream(file)
            check(stream.schema.names)
            yield from ((0, batch) for batch in stream)


def _values(column: Any) -> list[Any]:
    """Return a column's values; texts that are not UTF-8 as the error that says so."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return list(column.to_pylist())
    return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
