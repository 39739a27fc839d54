"""How large files, functions and folders may be."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from test_structure import PACKAGES, ROOT, assert_none

MAX_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCES = (".py", ".cpp", ".h", ".inl", ".jinja")
LARGE_FOLDERS: dict[str, str] = {"docs": "a page a task, found by the README's list"}  # folder: reason
LONG_FILES: dict[str, str] = {}  # path: reason
LONG_FUNCTIONS: dict[str, str] = {}  # "path:function": reason


def files_below(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"):
                yield path


def unless_excepted(violations: Mapping[str, str], exceptions: Mapping[str, str]) -> Iterator[str]:
    """Yield the violations that no exception names, and exceptions that are none any more."""
    yield from (f"{key}: {text}" for key, text in violations.items() if key not in exceptions)
    yield from (f"{key}: is no exception any more" for key in exceptions if key not in violations)


def test_no_folder_has_more_files_than_a_reader_keeps_in_mind() -> None:
    counts: dict[str, int] = {}
    for path in files_below(ROOT / "jaxgpt", ROOT / "export", ROOT / "bench", ROOT / "docs"):
        folder = str(path.parent.relative_to(ROOT))
        if ".egg-info" not in folder and not folder.startswith("bench/results"):
            counts[folder] = counts.get(folder, 0) + 1
    long = {
        name: f"{count} files, at most {MAX_FILES}" for name, count in counts.items() if count > MAX_FILES
    }
    assert_none(unless_excepted(long, LARGE_FOLDERS))


def test_no_file_is_longer_than_one_reads_in_a_sitting() -> None:
    long = {}
    for path in files_below(*PACKAGES.values(), ROOT / "export" / "native"):
        lines = path.read_text("utf-8").count("\n") if path.suffix in SOURCES else 0
        if lines > MAX_FILE_LINES:
            long[str(path.relative_to(ROOT))] = f"{lines} lines, at most {MAX_FILE_LINES}"
    assert_none(unless_excepted(long, LONG_FILES))


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and lines of every function of a Python file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and lines of what begins with a line at the margin and ends with a brace there."""
    lines = path.read_text("utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and re.match(r"[A-Za-z_].*\w\(", line) and not line.rstrip().endswith(";"):
            start = number
        elif start is not None and line.startswith("}"):
            name = re.search(r"([\w:~]+)\(", lines[start])
            yield name.group(1) if name else lines[start], number - start + 1
            start = None


def test_no_function_is_longer_than_a_screen() -> None:
    long = {}
    for path in files_below(*PACKAGES.values(), ROOT / "export" / "native"):
        find = {".py": python_functions, ".cpp": cpp_functions, ".inl": cpp_functions}.get(path.suffix)
        for name, lines in find(path) if find else ():
            if lines > MAX_FUNCTION_LINES:
                key = f"{path.relative_to(ROOT)}:{name}"
                long[key] = f"{lines} lines, at most {MAX_FUNCTION_LINES}"
    assert_none(unless_excepted(long, LONG_FUNCTIONS))
