"""Makes requests with their programs of Python functions: "Write a function to ..." -> fenced code.

    jaxgpt prepare --source stdlib --code requests --tokenizer bpe:4096 --out data/requests

A function's docstring ("Return the mean of data.") and its name (`is_prime`) say what it does; templates make
requests of that, several a function, more for one that needs nothing but Python itself. The program is the
function as ast writes it, without docstring, annotations and decorators, behind the imports that it uses. No
code is run or imported, and nothing is drawn: the same source gives the same documents.
"""

import ast
import builtins
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt.data.docstring_pairs import Pair, is_stub, parse_source, read_source, unparsed
from jaxgpt.data.report import ReadReport
from jaxgpt.data.requests.repetition import most_repeated, words_of
from jaxgpt.data.requests.wording import Task, request_of_name, tasks_of_sentence

# A small model that draws one bad token in a hundred and fifty ends few longer programs well.
MAX_PROGRAM_CHARACTERS = 240
# Of a function that needs more than Python: it teaches how names follow from requests, and little else.
MAX_OTHER_CHARACTERS = 160
# Such a model closes many brackets wrongly: 65 of 175 drawn programs with more in a line, 50 of 1,425 others.
MOST_BRACKETS = 3
# A program in which four words in a row stand more often teaches repetition.
MOST_REPEATS = 2
# Requests of a function that needs Python and its standard library alone, and of another.
PLAIN_REQUESTS, OTHER_REQUESTS = 3, 1
BASE_TEMPLATES = (
    "Write a function to {}",
    "Write a Python function to {}",
    "Python program to {}",
    "Write a function to {}",
    "Write a Python program to {}",
    "Python function to {}",
    "Create a function to {}",
    "{}",
)
THIRD_TEMPLATES = (
    "Write a function that {}",
    "Write a Python function that {}",
    "Write a function that {}",
    "Python program that {}",
    "Create a function that {}",
)


def requests_of_file(path: Path, report: ReadReport) -> Iterator[Pair]:
    """Yield the requests of a source file; one that does not parse has none, and is counted in the report."""
    found = read_source(path, report)
    if found is not None:
        yield from requests_of_tree(found[0])


def requests_of_tree(tree: ast.Module) -> Iterator[Pair]:
    """Yield the requests of a module, in the order of its functions; a pair's input is empty."""
    imports = _imports(tree)
    for node in _plain_functions(tree.body):
        yield from _pairs(node, imports)


def _plain_functions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Yield functions that are no methods, and static methods, which need no object either."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (each for each in node.body if isinstance(each, ast.FunctionDef) and _is_static(each))
        elif isinstance(node, ast.If | ast.Try):
            yield from _plain_functions(node.body)


def _is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)


def _imports(tree: ast.Module) -> dict[str, str]:
    """Return the statement that imports each name of a file, where it is of the standard library."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(each, each.name) for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [(each, node.module) for each in node.names]
        else:
            continue
        for alias, module in modules:
            if module.partition(".")[0] not in sys.stdlib_module_names:
                continue
            single = (
                ast.Import([alias])
                if isinstance(node, ast.Import)
                else ast.ImportFrom(node.module, [alias], 0)
            )
            found[(alias.asname or alias.name).partition(".")[0]] = ast.unparse(single)
    return found


def _pairs(node: ast.FunctionDef, imports: dict[str, str]) -> Iterator[Pair]:
    docstring = ast.get_docstring(node)
    body = node.body[1:] if docstring is not None else node.body
    if not body or is_stub(body) or node.name.startswith("__") or node.name in ("main", "test"):
        return
    name = node.name.strip("_")
    program = _program(node, name, body, imports)
    if program is None:
        return
    code, is_plain = program
    arguments = [each.arg for each in node.args.args]
    tasks = _tasks(name, docstring or "", arguments)
    count = PLAIN_REQUESTS if is_plain else OTHER_REQUESTS
    if not tasks or name.startswith("test"):
        return
    asked = dict.fromkeys(_request(tasks[k % len(tasks)], f"{name} {k} {len(code)}") for k in range(count))
    for request in asked:
        yield Pair(request, "", f"```python\n{code}\n```")


def _tasks(name: str, docstring: str, arguments: Sequence[str]) -> list[Task]:
    """Return what a function does, as (base form, third person), the likeliest to tell its name first."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    sentence = re.split(r"(?<=[^.A-Z])\.(?:\s|$)|;|:(?:\s|$)", " ".join(paragraph.split()), maxsplit=1)[0]
    words = [word for word in name.lower().split("_") if len(word) > 2]
    said = tasks_of_sentence(sentence) if sentence.isascii() and _tells(words, sentence) else []
    named = request_of_name(name, arguments)
    return [*said, *named[:1]] if said else named


def _tells(words: Sequence[str], sentence: str) -> bool:
    """Whether a sentence tells a function's name: it has one of the name's words, or the word's beginning."""
    return any(word[:4] in sentence.lower() for word in words)


def _request(task: Task, key: str) -> str:
    """Return a request for a task, its template chosen by the hash of a text."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    templates = [(each, 0) for each in BASE_TEMPLATES] + [(each, 1) for each in THIRD_TEMPLATES]
    template, form = templates[place % len(templates)]
    request = template.format(task[form])
    return request[0].upper() + request[1:]


def _program(
    node: ast.FunctionDef, name: str, body: Sequence[ast.stmt], imports: dict[str, str]
) -> tuple[str, bool] | None:
    """Return a function's program and whether it needs Python alone; None for one that is left out."""
    bare = ast.FunctionDef(name, node.args, list(body), [], None, None, lineno=0, col_offset=0)
    source = unparsed(bare)
    parsed = None if source is None else parse_source(source)
    if parsed is None or (name != node.name and name in _names_read(parsed)):  # _area, which calls area
        return None
    tree = _Bare(node.name, name).visit(parsed)
    free = _free_names(tree.body[0])
    used = sorted({imports[each] for each in free if each in imports})
    is_plain = _needs_python_alone(tree, free - set(imports))
    bare_code = unparsed(tree)
    if bare_code is None:
        return None
    code = "\n".join([*used, *([""] if used else []), _with_single_brackets(bare_code)])
    longest = MAX_PROGRAM_CHARACTERS if is_plain else MAX_OTHER_CHARACTERS
    if len(code) > longest or not code.isascii() or "```" in code:
        return None
    if most_repeated(words_of(code)) > MOST_REPEATS or _nests(code):
        return None
    return (code, is_plain) if parse_source(code) is not None else None


def _with_single_brackets(code: str) -> str:
    """Return code of ast.unparse as people write it, which makes sum((x for x in y)) of sum(x for x in y)."""
    begins = [0, *itertools.accumulate(len(line) + 1 for line in code.split("\n"))]
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            continue
        only = node.args[0]
        if isinstance(only, ast.GeneratorExp) and only.end_lineno and only.end_col_offset:
            first = begins[only.lineno - 1] + only.col_offset
            last = begins[only.end_lineno - 1] + only.end_col_offset - 1
            if code[first - 1 : first + 1] == "((" and code[last : last + 2] == "))":
                dropped |= {first, last}
    return "".join(char for at, char in enumerate(code) if at not in dropped)


class _Bare(ast.NodeTransformer):
    """Takes annotations and inner docstrings away, and gives a private function its plain name."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        plain = ast.Assign([node.target], node.value)
        return self.generic_visit(ast.fix_missing_locations(ast.copy_location(plain, node)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        if ast.get_docstring(node) is not None and len(node.body) > 1:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id == self.old:
            node.id = self.new
        return node


def _free_names(function: ast.stmt) -> set[str]:
    """Return the names that a function reads and nothing in it binds, and those that it declares global."""
    outside: set[str] = set()
    bound: set[str | None] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.Global):
            outside.update(node.names)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return (_names_read(function) - bound) | outside


def _names_read(tree: ast.AST) -> set[str]:
    return {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _needs_python_alone(tree: ast.Module, free: set[str]) -> bool:
    """Whether a program reads no names but its own and Python's, and imports the standard library alone."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("" if node.level else node.module or "")
    is_standard = all(each.partition(".")[0] in sys.stdlib_module_names for each in modules)
    return is_standard and all(hasattr(builtins, each) for each in free)


def _nests(code: str) -> bool:
    """Whether a line opens more brackets than MOST_BRACKETS, those in texts among them."""
    return any(sum(map(line.count, "([{")) > MOST_BRACKETS for line in code.splitlines())
