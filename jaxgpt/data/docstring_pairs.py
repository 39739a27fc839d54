"""Makes training text of Python source files: docstring -> code pairs, read with ast.

No code is run or imported. A pair has the columns of flytech/python-codes-25k: instruction (the docstring's
first paragraph), input (the signature), output (the source without its docstring, fenced), text (the three
joined by spaces).
"""

import ast
import dataclasses
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.data.reading.folder_files import SKIPPED_FOLDERS
from jaxgpt.data.reading.opening import open_file
from jaxgpt.data.report import ReadReport

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

DOCSTRING_CHARACTERS = range(15, 301)
MIN_DOCSTRING_WORDS = 3
MIN_SOURCE_LINES = 3
MAX_SOURCE_CHARACTERS = 4000
# Docstrings with one of these are left out: they stand in hundreds of places and say nothing of the code.
BOILERPLATE = ("*optional*", "This method is deprecated", "See base class")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One docstring -> code pair.

    Attributes:
      instruction: the docstring's first paragraph, on one line.
      input: name and arguments, or name and bases of a class.
      output: the source without its docstring, in a fence of Markdown.
    """

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> str:
        """What stands before the answer."""
        return f"{self.instruction} {self.input} "

    @property
    def text(self) -> str:
        """What a model is trained on."""
        return self.question + self.output


def source_files(folder: Path) -> list[Path]:
    """List the .py files below a folder in a stable order, the skipped folders left out."""
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1])
    ]


def pairs_of_file(path: Path, report: ReadReport | None = None) -> Iterator[Pair]:
    """Yield the pairs of a source file; one that does not parse has none, and is counted in the report."""
    found = read_source(path, report or ReadReport())
    if found is not None:
        yield from _pairs_of_tree(*found)


def read_source(path: Path, report: ReadReport) -> tuple[ast.Module, str] | None:
    """Return a source file's tree and text; None, counted in the report, for one that does not parse."""
    try:
        with open_file(path) as file:
            source = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        report.skip(".py files that are not UTF-8", str(path))
        return None
    tree = parse_source(source)
    if tree is None:
        report.skip(".py files that do not parse", str(path))
        return None
    return tree, source


def pairs_of_source(source: str) -> Iterator[Pair]:
    """Yield the pairs of Python source text, in the order of the definitions."""
    tree = parse_source(source)
    if tree is not None:
        yield from _pairs_of_tree(tree, source)


def _pairs_of_tree(tree: ast.Module, source: str) -> Iterator[Pair]:
    lines = re.split(r"\r\n|\r|\n", source)  # as ast counts them; str.splitlines cuts at form feeds too
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            pair = _pair(node, lines)
            if pair is not None:
                yield pair


def _pair(node: Definition, lines: list[str]) -> Pair | None:
    """Return the pair of a definition; None where docstring or code is missing, too short or too long."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:  # a docstring alone is a stub
        return None
    instruction = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    if (
        len(instruction) not in DOCSTRING_CHARACTERS
        or len(instruction.split()) < MIN_DOCSTRING_WORDS
        or not instruction.isascii()
        or any(sentence in instruction for sentence in BOILERPLATE)
    ):
        return None
    source, signature = _source_without_docstring(node, lines), _signature(node)
    if source is None or signature is None or is_stub(node.body[1:]):
        return None
    return Pair(instruction, signature, f"```python\n{source}\n```")


def _source_without_docstring(node: Definition, lines: list[str]) -> str | None:
    """Return the source, dedented; None where it can't be cut cleanly, or has not the length of a pair."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    doc = node.body[0]
    if doc.lineno == node.lineno or doc.end_lineno is None or node.body[1].lineno <= doc.end_lineno:
        return None  # docstring and code share a line
    kept = lines[start - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    while kept and not kept[-1].strip():
        kept.pop()
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept))
    source = re.sub(r"\n\n\n+", "\n\n", source)
    if source.count("\n") + 1 < MIN_SOURCE_LINES or len(source) > MAX_SOURCE_CHARACTERS:
        return None
    return source if parse_source(source) is not None else None


def parse_source(source: str) -> ast.Module | None:
    """Return the tree of Python source text; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_stub(body: list[ast.stmt]) -> bool:
    """Whether a body does nothing: pass, ..., or only `raise NotImplementedError`."""
    for statement in body:
        if isinstance(statement, ast.Pass):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.Raise) and "NotImplementedError" in (unparsed(statement) or ""):
            continue
        return False
    return True


def unparsed(node: ast.AST) -> str | None:
    """Return a node as source text; None where Python can't write it, as some f-strings and long sums."""
    try:
        return ast.unparse(node)
    except (ValueError, RecursionError):
        return None


def _signature(node: Definition) -> str | None:
    if isinstance(node, ast.ClassDef):
        bases = [unparsed(base) for base in node.bases]
        return None if None in bases else f"{node.name}({', '.join(filter(None, bases))})"
    arguments = unparsed(node.args)
    return None if arguments is None else f"{node.name}({arguments})"


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(ast.__file__).parent


def interpreter() -> str:
    """Name the running interpreter, for the manifest."""
    return f"CPython {sys.version.split()[0]}"
