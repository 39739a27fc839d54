"""Turns what `--source` names into documents; they are read as they are asked for.

hub:NAME[@REVISION]   a Hugging Face dataset (the text column of one data file)
stdlib                docstring -> code pairs of the running interpreter's standard library
packages:NAME,...     the same from installed packages, `stdlib` among them if it is named; with --include
                      other files of theirs (packages.py)
PATH                  a table, a text, source code, or a folder of such files (reading/folder_files.py)
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxgpt.data.docstring_pairs import pairs_of_file
from jaxgpt.data.documents import OFFLINE_CHOICES, Document, Piece, Source
from jaxgpt.data.hub import hub_documents, hub_pieces
from jaxgpt.data.packages import DOCUMENTATION, library_pieces, package_pieces, readme_document
from jaxgpt.data.reading.columns import DEFAULT_COLUMN, Columns
from jaxgpt.data.reading.folder_files import Patterns, source_files_of
from jaxgpt.data.reading.opening import DamagedFileError, uncompressed_name
from jaxgpt.data.reading.pieces import pieces_of
from jaxgpt.data.reading.rows import NoTableError
from jaxgpt.data.reading.text_files import read_text, text_documents
from jaxgpt.data.report import ReadReport
from jaxgpt.data.requests.functions import requests_of_file
from jaxgpt.data.requests.held_out import read_held_out, texts_without_held_out, without_held_out
from jaxgpt.data.requests.renamed import with_renamed
from jaxgpt.data.tables import local_table_documents
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import ENDOFTEXT

PYTHON = ("installed", "python")  # kinds of pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a source is read.

    Attributes:
      text_column: column of a table that holds the text.
      template: makes a text of several columns; empty for the one.
      code: what is taken of .py files: docstring pairs, requests with their programs, or whole files.
      held_out: text file of requests, one a line; programs of which one asks the same are left out.
      include: patterns of the files of a folder or of packages that are read; empty for all that are known.
      exclude: patterns of those that are not.
      skip_errors: leave out what is damaged instead of stopping there.
    """

    text_column: str = DEFAULT_COLUMN
    template: str = ""
    code: Literal["pairs", "requests", "files"] = "pairs"
    held_out: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_errors: bool = False

    @property
    def patterns(self) -> Patterns:
        """What --include and --exclude name."""
        return Patterns(self.include, self.exclude)

    @property
    def columns(self) -> Columns:
        """What makes a document of a row; UserError for a template that is none."""
        return Columns.of_template(self.template) if self.template else Columns.one(self.text_column)


def open_source(name: str, options: ReadOptions | None = None) -> Source:
    """Find a source.

    Args:
      name: as in the module's docstring.
      options: how it is read.

    Raises:
      UserError: nothing of that name can be read; the message names the choices.
    """
    options = options or ReadOptions()
    _ = options.columns  # of a template
    if options.held_out is not None:
        read_held_out(options.held_out)
    report = ReadReport(options.skip_errors)
    if name == "stdlib":
        return _source(name, *library_pieces(options.patterns, report), options, report)
    if name.startswith("packages:"):
        names = name.removeprefix("packages:").split(",")
        revision, pieces = package_pieces(names, options.patterns, report)
        if pieces and options.held_out is not None and all(piece.kind in DOCUMENTATION for piece in pieces):
            raise UserError(
                f"--held-out needs pairs, and --include {' '.join(options.include)} takes no .py file"
            )
        return _source(name, revision, pieces, options, report)
    if name == "hub" or name.startswith("hub:"):
        if options.include or options.exclude:
            raise UserError(
                "--include and --exclude choose among files, and a data set of the hub is one; leave them out"
            )
        return _source(name, *hub_pieces(name), options, report)
    path = Path(name)
    if not name or not path.exists():
        raise UserError(
            f"source {name!r} is neither hub:NAME, stdlib, packages:NAME,... nor an existing path; "
            f"{OFFLINE_CHOICES}"
        )
    files = source_files_of(path, options.patterns, report)
    return _source(name, f"{len(files)} files", pieces_of(files, path.is_dir()), options, report)


def _source(
    name: str, revision: str, pieces: Sequence[Piece], options: ReadOptions, report: ReadReport
) -> Source:
    def read(piece: Piece, report: ReadReport) -> Iterator[Document]:
        return read_piece(piece, options, report)

    return Source(name, revision, pieces, read, report)


def read_piece(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """Yield the documents of a piece of a source.

    Args:
      piece: of `open_source`.
      options: how the source is read.
      report: gains what is left out.

    Raises:
      UserError: what is damaged, unless errors are skipped.
    """
    documents = _read(piece, options, report)
    if options.held_out is not None:
        held_out = _held_out(options.held_out, _state(options.held_out))
        if piece.kind in DOCUMENTATION:
            documents = texts_without_held_out(documents, held_out, report)
        else:
            documents = without_held_out(documents, held_out, report, several=piece.kind in PYTHON)
    if options.code == "requests" and piece.kind in PYTHON:
        documents = with_renamed(documents)
    yield from documents


@functools.lru_cache(1)
def _held_out(path: Path, state: tuple[int, int]) -> frozenset[str]:
    return read_held_out(path)  # once for all pieces


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    if piece.kind == "hub":
        yield from hub_documents(piece, options.columns, report)
    elif piece.kind == "installed":
        yield from _python(piece, options, report)
    elif piece.kind == "readme":
        yield from readme_document(piece)
    else:
        try:
            yield from _local(piece, options, report)
        except DamagedFileError as error:
            reason = "damaged tables, from there on" if piece.kind == "table" else "damaged files"
            report.damaged(str(error), reason, piece.path)


def _python(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    if options.code == "files":
        yield from _text(piece, report)
        return
    if options.code == "requests":
        for pair in requests_of_file(Path(piece.path), report):
            yield Document(f"{pair.instruction}\n{pair.output}", piece.group, len(pair.instruction))
        return
    for pair in pairs_of_file(Path(piece.path), report):
        yield Document(pair.text, piece.group, len(pair.question))


def _text(piece: Piece, report: ReadReport) -> Iterator[Document]:
    path = Path(piece.path)
    text = read_text(path, report, piece.begin, piece.end)
    if text is None:
        return
    if piece.kind == "separated":
        yield from (Document(part, part) for part in text.split(ENDOFTEXT))
        return
    separated = Path(uncompressed_name(path)).suffix.lower() == ".txt"
    yield from text_documents(text, piece.group, piece.alone, separated)


def _local(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    if piece.kind == "table":
        yield from _table(piece, options, report)
    elif piece.kind == "python" and options.code == "pairs":
        yield from _counted_pairs(piece, options, report)
    elif piece.kind == "python" and options.code == "requests":
        yield from _python(piece, options, report)
    else:
        yield from _text(piece, report)


def _counted_pairs(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    taken = 0
    for document in _python(piece, options, report):
        taken += len(document.text.encode("utf-8", "replace"))
        yield document
    report.add_pairs(Path(piece.path).stat().st_size, taken)


def _table(piece: Piece, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """Yield a table's rows; a .json of a folder that is no such table is left out (package.json, say)."""
    path, columns = Path(piece.path), options.columns
    suffix = Path(uncompressed_name(path)).suffix.lower()
    try:
        yield from local_table_documents(path, columns, report, piece.begin, piece.end)
    except NoTableError as error:
        if not options.skip_errors and not (piece.in_folder and suffix == ".json"):
            raise UserError(str(error)) from None
        report.skip(f"{suffix} files that are no table with {' and '.join(columns.names)}", piece.group)
