"""Opens a file that may be compressed: .gz, .xz, .bz2 and .zst, told by the end of its name."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")


class DamagedFileError(UserError):
    """A compressed file is cut, or is none."""


def uncompressed_name(path: Path) -> str:
    """Return a file's name without the ending of its compression."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file; what is read from it is uncompressed.

    Raises:
      DamagedFileError: inside the block, where the compressed file is damaged.
    """
    with path.open("rb") as stored, _uncompressed(stored, path.suffix.lower()) as file:
        try:
            yield file
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if path.suffix.lower() not in COMPRESSED:
                raise
            cause = str(error) or type(error).__name__
            raise DamagedFileError(f"{path} is damaged or cut ({cause}); compress it again") from None


def _uncompressed(stored: io.BufferedReader, suffix: str) -> io.BufferedReader:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstandard}
    return io.BufferedReader(openers[suffix](stored)) if suffix in openers else stored


def _zstandard(stored: io.BufferedReader) -> Any:
    import pyarrow as pa  # slow to import; Python itself reads .zst from 3.14 on

    return pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd")
