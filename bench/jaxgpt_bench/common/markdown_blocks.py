"""Tables inside a text that commands write: between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic


def write_between_markers(path: Path, name: str, content: str) -> None:
    """Replace what stands between two markers; UserError when the file or the markers are missing."""
    before, begin, end, after = _around(path, name)
    write_atomic(path, f"{before}{begin}\n{content}\n{end}{after}")


def require_markers(path: Path, name: str) -> None:
    """Raise UserError when a file or its markers are missing, before hours are spent on the content."""
    _around(path, name)


def _around(path: Path, name: str) -> tuple[str, str, str, str]:
    if not path.is_file():
        raise UserError(f"{path} is missing; give a text with a table's markers")
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no {begin} ... {end}")
    return before, begin, end, after
