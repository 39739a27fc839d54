"""Installed packages: which of their files are read. No package is imported.

Their .py files are. `--include` and `--exclude` choose among them, and `--include` takes files of other kinds
in, as text: a package's documentation, and its README.md as its metadata have it. Patterns are held against
a path that begins with the package's name, such as `numpy/lib/format.py`.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.docstring_pairs import interpreter, source_files, standard_library
from jaxgpt.data.documents import Document, Piece
from jaxgpt.data.reading.folder_files import SKIPPED_FOLDERS, Patterns
from jaxgpt.data.reading.pieces import file_piece
from jaxgpt.shared.errors import UserError

README = "README.md"  # what a package's description in its metadata is called
DOCUMENTATION = ("documentation", "readme")  # kinds of pieces: a file, a description


def package_pieces(names: Sequence[str], patterns: Patterns) -> tuple[str, list[Piece]]:
    """Return what tells the versions of packages, and their files.

    Args:
      names: importable names; `stdlib` is the running interpreter's standard library.
      patterns: of the files that are read.

    Raises:
      UserError: one is not installed, or the patterns leave no file.
    """
    folders = [(name, _folder(name)) for name in names]
    distributions = importlib.metadata.packages_distributions()  # a second where hundreds are installed
    pieces = []
    for name, folder in folders:
        pieces += folder_pieces(folder, f"{name}/", patterns)
        if name != "stdlib" and patterns.include and patterns.fit(f"{name}/{README}"):
            pieces += _readme(name, distributions.get(name, []))
    revision = ", ".join(_version(name, distributions.get(name, [])) for name in names)
    return revision, _not_empty(pieces, patterns)


def library_pieces(patterns: Patterns) -> tuple[str, list[Piece]]:
    """Return what tells the version of the standard library, and its files, without a name before them."""
    return interpreter(), _not_empty(folder_pieces(standard_library(), "", patterns), patterns)


def folder_pieces(folder: Path, prefix: str, patterns: Patterns) -> list[Piece]:
    """Return the files of a package's folder that are read, in the order of their paths."""
    paths = _all_files(folder) if patterns.include else source_files(folder)
    named = [(path, prefix + path.relative_to(folder).as_posix()) for path in paths]
    return [
        file_piece(path, name, "installed" if path.suffix == ".py" else DOCUMENTATION[0])
        for path, name in named
        if patterns.fit(name)
    ]


def readme_document(piece: Piece) -> Iterator[Document]:
    """Yield a distribution's description, if it has one."""
    text = importlib.metadata.Distribution.at(Path(piece.path)).metadata.json.get("description")
    if isinstance(text, str) and text.strip():
        yield Document(text, piece.group)


def _folder(name: str) -> Path:
    if name == "stdlib":
        return standard_library()
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # __main__ has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"package {name!r} is not installed here (or is a single module); "
            "give importable names, such as packages:numpy,jax"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _all_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1]) and path.is_file()
    ]


def _readme(name: str, distributions: Sequence[str]) -> Iterator[Piece]:
    for distribution in distributions[:1]:
        files = importlib.metadata.files(distribution) or []
        for file in files:
            if file.name in ("METADATA", "PKG-INFO") and file.parent.suffix in (".dist-info", ".egg-info"):
                path = Path(str(file.locate()))
                size = path.stat().st_size
                yield Piece(path=str(path.parent), group=f"{name}/{README}", kind=DOCUMENTATION[1], size=size)


def _version(name: str, distributions: Sequence[str]) -> str:
    if name == "stdlib":
        return interpreter()
    version = importlib.metadata.version(distributions[0]) if distributions else "of unknown version"
    return f"{name} {version}"


def _not_empty(pieces: list[Piece], patterns: Patterns) -> list[Piece]:
    if not pieces and (patterns.include or patterns.exclude):
        raise UserError(
            f"no file of the packages fits --include {' '.join(patterns.include) or '*'}"
            + (f" without --exclude {' '.join(patterns.exclude)}" if patterns.exclude else "")
            + "; a pattern is held against paths such as numpy/lib/format.py"
        )
    return pieces
