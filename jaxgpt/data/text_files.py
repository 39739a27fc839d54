"""Opens a text file by its suffix: .gz, .xz and .zst are decompressed while they are read."""

import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxgpt.shared.errors import UserError

COMPRESSED = (".gz", ".xz", ".zst")


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds: .jsonl of rows.jsonl and of rows.jsonl.xz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read what it holds, decompressed.

    Raises:
      UserError: it is compressed, and damaged or cut (when that is met), or nothing here can decompress it.
    """
    if path.suffix not in COMPRESSED:
        with path.open("rb") as plain:
            yield plain
        return
    library = {".gz": gzip, ".xz": lzma, ".zst": None}[path.suffix] or _zstd(path)
    # What the three raise: at other bytes than theirs, at a wrong checksum, at an early end.
    errors = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, getattr(library, "ZstdError", EOFError), EOFError)
    try:
        with library.open(path, "rb") as file:
            yield file
    except errors as error:
        raise UserError(
            f"{path} is damaged or cut ({str(error) or type(error).__name__}); compress it again"
        ) from None


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file of UTF-8 text to read; see open_bytes.

    Raises:
      UserError: it is not UTF-8 (when that is met), or damaged.
    """
    with open_bytes(path) as file:
        try:
            yield io.TextIOWrapper(file, encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); convert it first") from None


def _zstd(path: Path) -> Any:
    """Return the module for Zstandard: Python's own from 3.14 on, else the package of that module."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise UserError(
        f"{path}: this Python can't decompress .zst; pip install backports.zstd, or give it as .xz or .gz"
    )
