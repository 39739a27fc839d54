"""Installed packages: which of their files are read. No package is imported.

Their .py files are. `--include` and `--exclude` choose among them, and `--include` takes files of other kinds
in, as text: a package's documentation, and its README.md as its metadata have it. Patterns are held against
a path that begins with the package's name, such as `numpy/lib/format.py` (of `--source stdlib` without it),
and against the name at its end.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.docstring_pairs import interpreter, source_files, standard_library
from jaxgpt.data.documents import Document, Piece
from jaxgpt.data.reading.folder_files import Patterns, files_below
from jaxgpt.data.reading.pieces import file_piece
from jaxgpt.data.report import ReadReport
from jaxgpt.shared.errors import UserError

README = "README.md"  # what a package's description in its metadata is called
DOCUMENTATION = ("documentation", "readme")  # kinds of pieces: a file, a description
_NO_DESCRIPTION = "UNKNOWN"  # what earlier tools wrote


def package_pieces(names: Sequence[str], patterns: Patterns, report: ReadReport) -> tuple[str, list[Piece]]:
    """Return what tells the versions of packages, and their files.

    Args:
      names: importable names; `stdlib` is the running interpreter's standard library.
      patterns: of the files that are read.
      report: gains what is left out.

    Raises:
      UserError: one is not installed, or the patterns leave no file.
    """
    folders = [(name, _folder(name)) for name in names]
    try:
        found = importlib.metadata.packages_distributions()  # a second where hundreds are installed
    except UnicodeDecodeError as error:
        raise UserError(
            f"the metadata of an installed package is not UTF-8 ({error}); mend or remove it"
        ) from None
    distributions = {name: _distribution(name, found.get(name, [])) for name in names}
    pieces = []
    for name, folder in folders:
        own = _folder_pieces(folder, f"{name}/", patterns, report)
        if patterns.include and patterns.reason_to_skip(f"{name}/{README}") is None:
            own += _readme(name, distributions[name])
        if not own:
            report.skip("packages of which no file is read", name)
        pieces += own
    revision = ", ".join(_version(name, distributions[name]) for name in names)
    return revision, _not_empty(pieces, patterns, "numpy/lib/format.py")


def library_pieces(patterns: Patterns, report: ReadReport) -> tuple[str, list[Piece]]:
    """Return what tells the version of the standard library, and its files, without a name before them."""
    pieces = _folder_pieces(standard_library(), "", patterns, report)
    return interpreter(), _not_empty(pieces, patterns, "json/decoder.py")


def readme_document(piece: Piece) -> Iterator[Document]:
    """Yield a distribution's description, if it has one."""
    metadata = importlib.metadata.Distribution.at(Path(piece.path).parent).metadata
    text = metadata.json.get("description")
    if isinstance(text, str) and text.strip() not in ("", _NO_DESCRIPTION):
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


def _folder_pieces(folder: Path, prefix: str, patterns: Patterns, report: ReadReport) -> list[Piece]:
    """Return the files of a package's folder that are read, in the order of their paths."""
    pieces = []
    for path in files_below(folder, report) if patterns.include else source_files(folder):
        name = prefix + path.relative_to(folder).as_posix()
        if reason := patterns.reason_to_skip(name):
            report.skip(reason, name)
        else:
            pieces.append(file_piece(path, name, "installed" if path.suffix == ".py" else DOCUMENTATION[0]))
    return pieces


def _distribution(name: str, distributions: Sequence[str | None]) -> str | None:
    """Return the distribution of a package: that of the same name, else the first by name."""
    named = sorted(each for each in distributions if each)  # a broken one has no name
    same = [each for each in named if _normalized(each) == _normalized(name)]
    return next(iter(same + named), None)


def _readme(name: str, distribution: str | None) -> Iterator[Piece]:
    """Yield the file of a distribution's metadata, which lies beside the package."""
    if distribution is None:
        return
    place = Path(str(importlib.metadata.distribution(distribution).locate_file("")))
    for kind, file in (("dist-info", "METADATA"), ("egg-info", "PKG-INFO")):
        for folder in sorted(place.glob(f"*.{kind}")):
            path = folder / file
            if _normalized(folder.stem.partition("-")[0]) == _normalized(distribution) and path.is_file():
                yield file_piece(path, f"{name}/{README}", DOCUMENTATION[1])
                return


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str, distribution: str | None) -> str:
    if name == "stdlib":
        return interpreter()
    version = importlib.metadata.version(distribution) if distribution else None
    return f"{name} {version or 'of unknown version'}"


def _not_empty(pieces: list[Piece], patterns: Patterns, example: str) -> list[Piece]:
    if not pieces and (patterns.include or patterns.exclude):
        raise UserError(
            f"no file of the packages fits --include {' '.join(patterns.include) or '*'}"
            + (f" without --exclude {' '.join(patterns.exclude)}" if patterns.exclude else "")
            + f"; a pattern is held against paths such as {example}"
        )
    return pieces
