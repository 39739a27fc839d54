"""Which files of a folder are read, and how: as a table, a text, Python or other source code.

A file is left out, and counted, where its name ends in nothing that is known, where it lies in a hidden
folder, in tests or installed packages, or in a data set that `jaxgpt prepare` wrote, where it describes data
instead of being some, and where --include and --exclude say so. A file that --include names is read as text
whatever its name ends in.
"""

import dataclasses
import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxgpt.data.reading.opening import uncompressed_name
from jaxgpt.data.report import ReadReport
from jaxgpt.shared.errors import UserError

Kind = Literal["table", "text", "python", "code"]

TABLE_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
# Source code that is taken as whole files.
CODE_SUFFIXES = frozenset({
    ".ada", ".adb", ".ads", ".asm", ".awk", ".bash", ".bat", ".c", ".cc", ".cjs", ".clj", ".cljs", ".cmake",
    ".coffee", ".cpp", ".cs", ".css", ".cu", ".cuh", ".cxx", ".d", ".dart", ".el", ".elm", ".erl", ".ex",
    ".exs", ".f", ".f03", ".f08", ".f77", ".f90", ".f95", ".fish", ".for", ".fs", ".fsx", ".glsl", ".go",
    ".gradle", ".groovy", ".h", ".hcl", ".hh", ".hlsl", ".hpp", ".hrl", ".hs", ".htm", ".html", ".hxx",
    ".inl", ".java", ".jl", ".js", ".jsx", ".kt", ".kts", ".less", ".lisp", ".lua", ".m", ".mjs", ".ml",
    ".mli", ".mm", ".nim", ".nix", ".pas", ".php", ".pl", ".pm", ".proto", ".ps1", ".purs", ".pyi", ".pyx",
    ".r", ".rb", ".rkt", ".rs", ".s", ".sass", ".scala", ".scm", ".scss", ".sh", ".sol", ".sql", ".sv",
    ".svelte", ".swift", ".tcl", ".tex", ".tf", ".ts", ".tsx", ".v", ".vb", ".vhd", ".vhdl", ".vim", ".vue",
    ".wat", ".wgsl", ".zig", ".zsh"
})  # fmt: skip
CODE_NAMES = frozenset({"Makefile", "Dockerfile", "Jenkinsfile", "Rakefile", "Gemfile"})
# Folders that are left out: tests of the interpreter, old grammars, other packages installed beside it.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
# What describes a data set: of the hub, of `save_to_disk`.
METADATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
SHOWN_SUFFIXES = ".txt, .md, .rst, .jsonl, .json, .csv, .tsv, .parquet, .py or other source code"


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Which files of a folder are read.

    Attributes:
      include: a file is read if one of these fits its path, or the name at its end; empty for all.
      exclude: patterns of files that are not read.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def include_names(self, name: str) -> bool:
        """Whether a pattern of `include` fits a path."""
        return _fits(name, self.include)

    def reason_to_skip(self, name: str) -> str | None:
        """Return why a file of this path is left out, as ReadReport.skip takes it; None where it is not."""
        if _fits(name, self.exclude):
            return "files that --exclude names"
        if self.include and not self.include_names(name):
            return "files that --include does not name"
        return None


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that is read.

    Attributes:
      path: where it lies.
      name: its path below the folder, or its name if it is given alone.
      kind: how it is read.
    """

    path: Path
    name: str
    kind: Kind


def kind_of(path: Path) -> Kind | None:
    """Tell how a file is read by its name, in whatever case and compressed or not; None if it is not."""
    name = uncompressed_name(path)
    suffix = Path(name).suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return "table"
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix == ".py":
        return "python"
    return "code" if suffix in CODE_SUFFIXES or name in CODE_NAMES else None


def source_files_of(root: Path, patterns: Patterns, report: ReadReport) -> list[SourceFile]:
    """Choose the files of a folder, in the order of their paths, or the one file that is given.

    Args:
      root: a file or a folder.
      patterns: held against paths below the folder.
      report: gains what is left out.

    Raises:
      UserError: no file is left.
    """
    if root.is_file():
        if patterns.reason_to_skip(root.name):
            raise UserError(
                f"--include and --exclude leave {root.name} out, which is all of --source; leave them out"
            )
        return [SourceFile(root, root.name, _kind_of_one(root, patterns))]
    paths = files_below(root, report)
    has_tables = any(_is_data(path, path.relative_to(root).as_posix(), patterns) for path in paths)
    chosen = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        kind = kind_of(path) or ("text" if patterns.include_names(name) else None)
        reason = patterns.reason_to_skip(name) or _reason_to_skip(kind, path)
        if reason is None and has_tables and name == "README.md" and not patterns.include_names(name):
            reason = "data set cards"
        if reason is not None:
            report.skip(reason, name)
        elif kind is not None:
            chosen.append(SourceFile(path, name, kind))
    if not chosen:
        raise UserError(
            f"{root} holds no file to read; expected {SHOWN_SUFFIXES}; left out: "
            f"{report.summary() or 'nothing'}; --include '*.xyz' reads any kind as text"
        )
    return chosen


def _is_data(path: Path, name: str, patterns: Patterns) -> bool:
    """Whether a file is a table that is read, beside which a README.md is a card; a .json may be anything."""
    is_table = kind_of(path) == "table" and Path(uncompressed_name(path)).suffix.lower() != ".json"
    return is_table and patterns.reason_to_skip(name) is None


def _kind_of_one(path: Path, patterns: Patterns) -> Kind:
    kind = kind_of(path) or ("text" if patterns.include_names(path.name) else None)
    if kind is None:
        raise UserError(
            f"{path} is no {SHOWN_SUFFIXES}; found: {path.suffix or path.name}; "
            f"--include '{path.name}' reads it as text"
        )
    return kind


def _reason_to_skip(kind: Kind | None, path: Path) -> str | None:
    """Return why a file is left out, as ReadReport.skip takes it; None where it is read."""
    if path.name in METADATA:
        return "files that describe a data set"
    if kind is None:
        return f"{path.suffix} files" if path.suffix else "files without a known ending"
    return None


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a path, or the name at its end; a star stands for anything, slashes too."""
    last = name.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(last, pattern) for pattern in patterns
    )


def files_below(root: Path, report: ReadReport) -> list[Path]:
    """Return the files of a folder in the order of their paths; the folders left out are counted."""
    return sorted(_walk(root, report))


def _walk(root: Path, report: ReadReport) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        report.skip("folders that can not be read", Path(error.filename).relative_to(root).as_posix())

    for where, folders, files in os.walk(root, onerror=unreadable):
        here = Path(where)
        for name in sorted(folders):
            below = (here / name).relative_to(root).as_posix()
            if name.startswith(".") or name in SKIPPED_FOLDERS:
                report.skip("folders that are hidden, tests or installed packages", below)
            elif (here / name).is_symlink():  # may lead back to where it lies
                report.skip("linked folders", below)
            elif is_dataset_folder(here / name):
                report.skip("data sets of jaxgpt prepare", below)
            else:
                continue
            folders.remove(name)
        own = (name for name in files if not (name.startswith(".") and ".tmp-" in name))  # not our temporary
        for path in map(here.joinpath, own):
            try:
                is_file = stat.S_ISREG(path.stat().st_mode)
            except FileNotFoundError:  # a link to nowhere
                continue
            except OSError:
                report.skip("files that can not be read", path.relative_to(root).as_posix())
                continue
            if is_file:
                yield path


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder is what `jaxgpt prepare` writes."""
    return all(os.path.isfile(folder / name) for name in ("manifest.json", "val.bin"))
