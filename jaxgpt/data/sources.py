"""Turns what `--source` names into documents; they are read as they are asked for.

hub:NAME[@REVISION]   a Hugging Face dataset (the text column of one data file)
stdlib                docstring -> code pairs of the running interpreter's standard library
packages:NAME,...     the same from installed packages, `stdlib` among them if it is named
PATH                  a table, a text, source code, or a folder of such files (reading/folder_files.py)
"""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxgpt.data.docstring_pairs import interpreter, pairs_of_file, source_files, standard_library
from jaxgpt.data.documents import OFFLINE_CHOICES, Document, Source
from jaxgpt.data.hub import hub_source
from jaxgpt.data.reading.columns import DEFAULT_COLUMN, Columns
from jaxgpt.data.reading.folder_files import SourceFile, source_files_of
from jaxgpt.data.reading.opening import DamagedFileError, uncompressed_name
from jaxgpt.data.reading.rows import NoTableError
from jaxgpt.data.reading.text_files import read_text, text_documents
from jaxgpt.data.report import ReadReport
from jaxgpt.data.requests.functions import requests_of_file
from jaxgpt.data.requests.held_out import read_held_out, without_held_out
from jaxgpt.data.tables import local_table_documents
from jaxgpt.shared.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a source is read.

    Attributes:
      text_column: column of a table that holds the text.
      template: makes a text of several columns; empty for the one.
      code: what is taken of .py files: docstring pairs, requests with their programs, or whole files.
      held_out: text file of requests, one a line; pairs that ask the same are left out.
      include: patterns of the files of a folder that are read; empty for all that are known.
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
    if options.held_out is None:
        return _open(name, options)
    held_out = read_held_out(options.held_out)
    source = _open(name, options)
    documents = without_held_out(source.documents, held_out, source.report)
    return dataclasses.replace(source, documents=documents)


def _open(name: str, options: ReadOptions) -> Source:
    columns, report = options.columns, ReadReport(options.skip_errors)
    if name == "stdlib":
        documents = _installed(standard_library(), "", options, report)
        return Source(name, interpreter(), documents, report)
    if name.startswith("packages:"):
        return _packages(name, options, report)
    if name == "hub" or name.startswith("hub:"):
        return hub_source(name, columns, report)
    path = Path(name)
    if not name or not path.exists():
        raise UserError(
            f"source {name!r} is neither hub:NAME, stdlib, packages:NAME,... nor an existing path; "
            f"{OFFLINE_CHOICES}"
        )
    files = source_files_of(path, options.include, options.exclude, report)
    documents = _local(files, columns, options, report, in_folder=path.is_dir())
    return Source(name, f"{len(files)} files", documents, report)


def _packages(name: str, options: ReadOptions, report: ReadReport) -> Source:
    folders, versions = [], []
    for package in name.removeprefix("packages:").split(","):
        if package == "stdlib":
            folders.append((package, standard_library()))
            versions.append(interpreter())
            continue
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"package {package!r} is not installed here (or is a single module); "
                "give importable names, such as packages:numpy,jax"
            )
        folders.append((package, Path(next(iter(spec.submodule_search_locations)))))
        versions.append(f"{package} {_version(package)}")
    documents = (
        document
        for package, folder in folders
        for document in _installed(folder, f"{package}/", options, report)
    )
    return Source(name, ", ".join(versions), documents, report)


def _version(package: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


def _installed(folder: Path, prefix: str, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    for path in source_files(folder):
        yield from _python(path, prefix + path.relative_to(folder).as_posix(), options, report)


def _python(path: Path, group: str, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    if options.code == "files":
        yield from _whole(path, group, report, alone=False)
        return
    if options.code == "requests":
        for pair in requests_of_file(path, report):
            yield Document(f"{pair.instruction}\n{pair.output}", group, len(pair.instruction))
        return
    for pair in pairs_of_file(path, report):
        yield Document(pair.text, group, len(pair.question))


def _whole(path: Path, group: str, report: ReadReport, alone: bool) -> Iterator[Document]:
    text = read_text(path, report)
    if text is not None:
        separated = Path(uncompressed_name(path)).suffix.lower() == ".txt"
        yield from text_documents(text, group, alone, separated)


def _local(
    files: Sequence[SourceFile], columns: Columns, options: ReadOptions, report: ReadReport, in_folder: bool
) -> Iterator[Document]:
    for file in files:
        try:
            if file.kind == "table":
                yield from _table(file, columns, options, report, in_folder)
            elif file.kind == "python" and options.code == "pairs":
                yield from _counted_pairs(file, options, report)
            elif file.kind == "python" and options.code == "requests":
                yield from _python(file.path, file.name, options, report)
            else:
                yield from _whole(file.path, file.name, report, alone=len(files) == 1)
        except DamagedFileError as error:
            report.damaged(str(error), "damaged files", str(file.path))


def _counted_pairs(file: SourceFile, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    taken = 0
    for document in _python(file.path, file.name, options, report):
        taken += len(document.text.encode("utf-8", "replace"))
        yield document
    report.add_pairs(file.path.stat().st_size, taken)


def _table(
    file: SourceFile, columns: Columns, options: ReadOptions, report: ReadReport, in_folder: bool
) -> Iterator[Document]:
    """Yield a table's rows; a .json of a folder that is no such table is left out (package.json, say)."""
    suffix = Path(uncompressed_name(file.path)).suffix.lower()
    try:
        yield from local_table_documents(file.path, columns, report)
    except NoTableError as error:
        if not options.skip_errors and not (in_folder and suffix == ".json"):
            raise UserError(str(error)) from None
        report.skip(f"{suffix} files that are no table with {' and '.join(columns.names)}", file.name)
