"""Reads tables (.jsonl, .json, .parquet, local or on the hub): each row's text column becomes a document."""

import glob
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from jaxgpt.data.documents import Document
from jaxgpt.shared.errors import UserError

TABLE_SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference


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
    if text_column not in table.column_names:
        raise UserError(
            f"{where} has no column {text_column!r}; it has {', '.join(table.column_names)}; "
            "name one with --text-column"
        )
    for number, text in enumerate(table[text_column]):
        if not isinstance(text, str):
            raise UserError(
                f"{where} row {number}: column {text_column!r} holds {type(text).__name__}, no text"
            )
        yield Document(text, text)
