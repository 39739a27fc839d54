"""Python source files of what is installed here, as JSON lines: text of any size to prepare."""

import json
import re
import site
import sysconfig
from pathlib import Path

from jaxgpt.shared.errors import UserError

LEAST_CHARACTERS = 200
_LONG_WORD = re.compile(r"\b[A-Za-z_]{5,}\b")


def write_source(path: Path, size_bytes: int) -> int:
    """Write a .jsonl of that size; return the number of files in it.

    Where what is installed does not suffice it comes again, every long word with a number behind it, so that
    no document and no run of 50 tokens stands twice for that reason.

    Args:
      path: the file to write.
      size_bytes: about how large.
    """
    folders = installed_folders()
    files = sorted({file for folder in folders for file in folder.rglob("*.py")})
    written, count, variant = 0, 0, 0
    with path.open("w", encoding="utf-8") as out:
        while written < size_bytes:
            before = written
            for file in files:
                line = _line(file, variant)
                if line is not None:
                    out.write(line)
                    written, count = written + len(line), count + 1
                if written >= size_bytes:
                    break
            if written == before:
                raise UserError(f"no Python file is installed below {', '.join(map(str, folders))}")
            variant += 1
    return count


def installed_folders() -> list[Path]:
    """Return where Python's own and other packages are installed."""
    return [Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages())]


def _line(file: Path, variant: int) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) < LEAST_CHARACTERS:
        return None
    if variant:
        text = _LONG_WORD.sub(rf"\g<0>{variant}", text)
    return json.dumps({"text": text}) + "\n"
