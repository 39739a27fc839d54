"""The walls between packages, rooms and files: who imports whom.

Reads the sources alone (ast): imports inside functions and under TYPE_CHECKING count as much as those at the
head. A room is a folder; a file that lies beside folders, such as cli.py or quantize/command.py, is a room by
itself.
"""

import ast
import dataclasses
import functools
import itertools
import json
import subprocess
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import python

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "jaxgpt": ROOT / "jaxgpt",
    "jaxgpt_export": ROOT / "export" / "jaxgpt_export",
    "jaxgpt_bench": ROOT / "bench" / "jaxgpt_bench",
}
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
TORCH = ("torch", "torchao", "executorch", "safetensors.torch", "transformers")

# Rooms from the specific to the general; an import goes down or stays on its level.
JAXGPT_ORDER = (("__main__",), ("cli",), ("training", "data"), ("generation",), ("shared",))
EXPORT_ORDER = (
    ("__main__", "pytest_plugin"),
    ("cli",),
    ("__init__", "convert", "verify", "llm", "pretrained", "serve"),
    ("generation", "interchange", "quantize"),
    ("parity",),
    ("flax_run", "model", "native"),
    ("format",),
)

BENCH_ORDER = (
    ("__main__",),
    ("cli",),
    ("pages",),
    ("reproduce",),
    ("report", "evaluate", "serving"),
    ("quality",),
    ("speed", "training", "recipe", "prepare"),
    ("sandbox", "peers", "profile"),
    ("noise",),
    ("common",),
)

# One import may go up, by name: jaxgpt.LLM is found in jaxgpt_export when it is first used.
UPWARD = {("jaxgpt", "jaxgpt_export.llm")}


@dataclasses.dataclass(frozen=True)
class Import:
    """One name that a file imports.

    Attributes:
      target: dotted name of a module; of a name that is imported from it, if that is a module too.
      line: where.
      head: whether it runs when the file is imported.
    """

    target: str
    line: int
    head: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A Python file of a package.

    Attributes:
      name: dotted; that of the package for an __init__.
      path: of the file.
      imports: every one, in the order of the file.
    """

    name: str
    path: Path
    imports: tuple[Import, ...]

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """The folder, from the package on, as a dotted name; the file where folders lie beside it."""
        folder = self.path.parent
        names = (self.package, *folder.relative_to(PACKAGES[self.package]).parts)
        beside = any(folder.glob("*/__init__.py"))
        return ".".join((*names, self.path.stem) if beside else names)

    @property
    def top_room(self) -> str:
        """The room that the import order speaks of: the first name below the package."""
        return self.room.split(".")[1]


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def imports_of(tree: ast.Module, name: str, is_package: bool, modules: Iterable[str]) -> Iterator[Import]:
    """Yield what a file imports, `importlib.import_module` of a plain string included."""

    def visit(node: ast.AST, head: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, head) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if whole in modules else base, node.lineno, head)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, head)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            head = False
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, head)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, head)

    yield from visit(tree, True)


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


@functools.cache
def sources() -> dict[str, Source]:
    """Return every Python file of the three packages by its dotted name."""
    paths = {
        module_name(package, path): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }
    return {
        name: Source(
            name,
            path,
            tuple(imports_of(ast.parse(path.read_text("utf-8")), name, path.stem == "__init__", paths)),
        )
        for name, path in paths.items()
    }


def own(target: str) -> Source | None:
    """Return the file that an import of a dotted name reads; None for other people's packages."""
    parts = target.split(".")
    while parts:
        if found := sources().get(".".join(parts)):
            return found
        parts.pop()
    return None


def is_of(target: str, packages: Iterable[str]) -> bool:
    return any(target == package or target.startswith(f"{package}.") for package in packages)


def graph(node: Callable[[Source], str]) -> dict[str, dict[str, str]]:
    """Return the imports between nodes: importing -> imported -> the first place that says so."""
    edges: dict[str, dict[str, str]] = {}
    for source in sources().values():
        here = edges.setdefault(node(source), {})
        for each in source.imports:
            target = own(each.target)
            if target and node(target) != node(source) and (source.name, each.target) not in UPWARD:
                here.setdefault(node(target), f"{source.where}:{each.line}")
    return edges


def shortest_path(edges: Mapping[str, Iterable[str]], start: str, end: str) -> list[str]:
    """Return the nodes from start to end, both included; empty where there is no way."""
    came: dict[str, str] = {}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for after in edges.get(here, ()):
            if after == end:
                path = [end, here]
                while path[-1] != start:
                    path.append(came[path[-1]])
                return path[::-1]
            if after not in came and after != start:
                came[after] = here
                queue.append(after)
    return []


def circles(edges: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each shortest circle, with the places of its imports; no import is in two lines."""
    found = [circle for node in sorted(edges) if (circle := shortest_path(edges, node, node))]
    told: set[tuple[str, str]] = set()
    lines = []
    for circle in sorted(found, key=len):
        steps = list(itertools.pairwise(circle))
        if told.isdisjoint(steps):
            told |= set(steps)
            lines.append("circle: " + ", ".join(f"{a} -> {b} ({edges[a][b]})" for a, b in steps))
    return lines


def assert_none(violations: Iterable[str]) -> None:
    lines = sorted(set(violations))
    if lines:
        pytest.fail(f"{len(lines)} violations:\n  " + "\n  ".join(lines), pytrace=False)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert_none(circles(graph(lambda source: source.name)))


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert_none(circles(graph(lambda source: source.room)))


def against(order: tuple[tuple[str, ...], ...], package: str) -> Iterator[str]:
    """Yield the imports of a package that go up in an order of its rooms, and the rooms that it lacks."""
    level = {room: number for number, rooms in enumerate(order) for room in rooms}
    for source in sources().values():
        if source.package != package:
            continue
        if source.top_room not in level:
            if source.top_room != "__init__":
                yield f"{source.where}: {source.top_room} has no place in the order of this test"
            continue
        for each in source.imports:
            target = own(each.target)
            inside = target is not None and target.package == package and target.top_room in level
            if inside and level[target.top_room] < level[source.top_room]:
                yield f"{source.where}:{each.line}: {source.top_room} imports {each.target}, from above"


def test_rooms_of_jaxgpt_import_downwards() -> None:
    assert_none(against(JAXGPT_ORDER, "jaxgpt"))


def test_data_and_training_do_not_know_each_other() -> None:
    assert_none(
        f"{source.where}:{each.line}: imports {each.target}"
        for source in sources().values()
        for each in source.imports
        if (source.name.startswith("jaxgpt.data") and is_of(each.target, ["jaxgpt.training"]))
        or (source.name.startswith("jaxgpt.training") and is_of(each.target, ["jaxgpt.data"]))
    )


def test_rooms_of_jaxgpt_export_import_downwards() -> None:
    assert_none(against(EXPORT_ORDER, "jaxgpt_export"))


def test_rooms_of_jaxgpt_bench_import_downwards() -> None:
    assert_none(against(BENCH_ORDER, "jaxgpt_bench"))


def test_packages_import_downwards() -> None:
    """jaxgpt_bench -> jaxgpt_export -> jaxgpt.{generation,shared}; flax_run and bench alone know training."""

    def allowed(source: Source, target: str) -> bool:
        package = target.partition(".")[0]
        if package not in PACKAGES or package == source.package or source.package == "jaxgpt_bench":
            return True
        if source.package == "jaxgpt":
            return (source.name, target) in UPWARD
        rooms = ["jaxgpt.generation", "jaxgpt.shared"]
        if source.room == "jaxgpt_export.flax_run":
            rooms.append("jaxgpt.training")
        return is_of(target, rooms)

    assert_none(
        f"{source.where}:{each.line}: imports {each.target}"
        for source in sources().values()
        for each in source.imports
        if not allowed(source, each.target)
    )


def command_modules() -> set[str]:
    """Return the files that the COMMANDS tables of the three cli.py name."""
    found = set()
    for package, folder in PACKAGES.items():
        for node in ast.walk(ast.parse((folder / "cli.py").read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                module = node.value.partition(":")[0]
                if ":" in node.value and module.startswith(f"{package}."):
                    found.add(module)
    return found


def head_imports(name: str) -> Iterator[Import]:
    """Yield what runs when a module is imported: its own head, and the packages that it lies in."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield Import(".".join(parts[:count]), 0, True)
    yield from (each for each in sources()[name].imports if each.head)


def test_commands_and_packages_import_neither_jax_nor_torch_at_their_head() -> None:
    """Through other files of the project too: `--help` and `import jaxgpt_export` take no second."""
    heavy = (*JAX, *TORCH)
    edges: dict[str, list[str]] = {}
    for name in sources():
        targets = [each.target for each in head_imports(name)]
        edges[name] = [
            *(found.name for target in targets if (found := own(target)) and found.name != name),
            *("JAX or PyTorch" for target in targets if is_of(target, heavy)),
        ]
    wanted = command_modules() | {
        name for name, source in sources().items() if source.path.stem == "__init__"
    }
    assert len(command_modules()) >= 20
    paths = (
        shortest_path(edges, name, "JAX or PyTorch") if name in sources() else [name, "(no such file)"]
        for name in sorted(wanted)
    )
    assert_none(" -> ".join(path) for path in paths if path)


def test_shared_generation_format_and_native_know_neither_jax_nor_torch() -> None:
    rooms = ("jaxgpt.shared", "jaxgpt.generation", "jaxgpt_export.format", "jaxgpt_export.native")
    assert_none(
        f"{source.where}:{each.line}: imports {each.target}"
        for source in sources().values()
        if is_of(source.name, rooms)
        for each in source.imports
        if is_of(each.target, (*JAX, *TORCH))
    )


def loaded_by(*modules: str) -> set[str]:
    """Return which of JAX and PyTorch a fresh interpreter has after it imported modules."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {list(modules)!r}: importlib.import_module(name)\n"
        "heavy = {'jax', 'flax', 'torch', 'transformers'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout))


def test_a_fresh_interpreter_that_imports_every_command_has_neither_jax_nor_torch() -> None:
    assert loaded_by(*sorted(command_modules())) == set()


def test_the_pytest_plugin_imports_neither_jax_nor_torch() -> None:
    """Every pytest of an environment imports it, those of other people's projects too."""
    assert loaded_by("jaxgpt_export.pytest_plugin") == set()


def test_an_installation_holds_the_three_packages_and_nothing_else() -> None:
    """No package called export, bench or tests: such names belong to other people's projects."""
    discovery = pytest.importorskip("setuptools.discovery", reason="setuptools is not installed")
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    # Packages without __init__.py are found too, as pyproject.toml's `find` does.
    found = {
        name
        for where in find["where"]
        for name in discovery.PEP420PackageFinder.find(ROOT / where, include=find["include"])
    }
    assert {name.partition(".")[0] for name in found} == set(PACKAGES)
    folders = {
        name if source.path.stem == "__init__" else name.rpartition(".")[0]
        for name, source in sources().items()
    }
    assert folders <= found
    assert_none(f"{name} has no __init__.py" for name in folders if name not in sources())
