"""The README and docs/: commands run as they stand and print what is shown, links lead somewhere."""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error, run_command
from jaxgpt_export.native.library import instruction_sets

from jaxgpt.shared.console import parse
from jaxgpt.training.options import TrainOptions, train_config
from jaxgpt.training.run.training import _require_even_split

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
MAX_WORDS = 1200
FIRST_SCREEN = 12  # lines: the claim, what to type, the picture
MODULES = {"jaxgpt": "jaxgpt", "jaxgpt-export": "jaxgpt_export", "jaxgpt-bench": "jaxgpt_bench"}

# Of the README's numbers, those that no Python version and no CPU changes.
STABLE = (
    "vocabulary 2048", "691,712 parameters", "2,048 tokens a step", "60 steps done", "step 60, 2.77 MB",
    "1,024 positions", "2.77 -> 0.73 MB",
)  # fmt: skip
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")
WRITES_TEXT = ("jaxgpt-export generate", "jaxgpt sample")  # the last line alone is not the model's


def fenced(text: str, language: str) -> list[str]:
    return [block for _, block in re.findall(rf"(?ms)^(`{{3,}}){language}\n(.*?)^\1$", text)]


def sessions(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a page's console blocks, each with the lines that it is said to print."""
    for block in fenced(text, "console"):
        for part in re.split(r"(?m)^\$ ", block)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            yield command, lines


def environment() -> dict[str, str]:
    """Console commands of this interpreter first on PATH; the CPU alone; compiled as for a user."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}{os.pathsep}{ROOT / 'bench'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }


def run_line(line: str, folder: Path) -> str:
    """Run a command as it stands; return what it printed, stdout first."""
    # The entry points themselves are installed by `make setup`; -m is the same without an installation.
    program, _, rest = line.partition(" ")
    shell = f'"{sys.executable}" -m {MODULES[program]} {rest}'
    done = subprocess.run(
        shell, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    return f"{done.stdout}\n{done.stderr}"


def run_line_here(line: str, folder: Path) -> str:
    """The same in this process, which has imported JAX and PyTorch already."""
    program, *words = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(program, *words)
    assert code == 0, f"{line}\n{err.getvalue()[-2000:]}"
    return f"{out.getvalue()}\n{err.getvalue()}"


def shape(line: str) -> str:
    """Leave out of a line what depends on the machine: numbers, the engine, how a text ended."""
    line = re.sub(r"jaxgpt-(?:native|torch)(?: \([\w-]+\))?", "ENGINE", line.rstrip())
    line = re.sub(r"(tokens/s), \d+ of \d+ draft tokens were accepted$", r"\1", line)
    line = re.sub(r"\((?:length|endoftext)\)", "(END)", line)
    line = re.sub(r" of \S*data/stdlib$", " of DATA", line)
    return NUMBER.sub("#", line)


def assert_prints(command: str, shown: list[str], printed: str) -> None:
    """Every line that is shown is printed, in this order; between them only what "..." stands for."""
    lines = [shape(line) for line in printed.split("\n") if line.strip()]
    if command.startswith(WRITES_TEXT):
        shown = shown[-1:]
        lines = lines[-1:]
    at, skips = 0, False
    for wanted in map(shape, shown):
        if wanted == "...":
            skips = True
            continue
        if skips:
            assert wanted in lines[at:], f"{command} does not print {wanted!r} but\n{printed[-3000:]}"
            at = lines.index(wanted, at)
        assert lines[at : at + 1] == [wanted], f"{command} does not print {wanted!r} but\n{printed[-3000:]}"
        at, skips = at + 1, False
    assert skips or at == len(lines), f"{command} prints more than is shown: {lines[at:]}"


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which the README's commands have run, and what each printed."""
    folder = tmp_path_factory.mktemp("readme")
    return folder, {command: run_line(command, folder) for command, _ in sessions(TEXT)}


def test_the_readme_s_commands_print_what_it_shows(tried: tuple[Path, dict[str, str]]) -> None:
    _, printed = tried
    assert len(printed) == 5
    for command, shown in sessions(TEXT):
        assert_prints(command, shown, printed[command])
    for fact in STABLE:
        assert fact in TEXT
        assert any(fact in text for text in printed.values()), f"nothing prints {fact!r}"


@pytest.mark.parametrize("block", fenced(TEXT, "python"))
def test_the_readme_s_python_runs_as_it_stands(block: str, tried: tuple[Path, dict[str, str]]) -> None:
    end = ""
    if "import LLM" in block:
        end = "\nassert isinstance(text, str)"
    elif "logits" in block:
        end = "\nassert logits.shape == (1, 3, 2048)"
    done = subprocess.run(
        [sys.executable, "-c", block + end], cwd=tried[0], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


WITH_COMMANDS = ("data", "training", "deployment", "quantization", "engine", "results")


def page_text(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_commands_of_a_page_print_what_it_shows(name: str, tried: tuple[Path, dict[str, str]]) -> None:
    if not instruction_sets() and name in ("engine", "results"):
        pytest.skip("no C++ compiler built the engine")
    found = list(sessions(page_text(name)))
    assert found
    for command, shown in found:
        assert_prints(command, shown, run_line_here(command, tried[0]))


def test_no_page_shows_commands_that_no_test_runs() -> None:
    with_commands = {path for path in PAGES if list(sessions(path.read_text(encoding="utf-8")))}
    assert with_commands == {README, *(ROOT / "docs" / f"{name}.md" for name in WITH_COMMANDS)}


def test_a_line_that_is_not_printed_is_found() -> None:
    printed = "a 1 line\nstep 3\nstep 4\nthe end, 0.5 s\n"
    assert_prints("x", ["a 2 line", "...", "the end, 0.7 s"], printed)
    for wrong in (
        ["a 2 line", "the end, 0.7 s"],
        ["a line", "..."],
        ["...", "the end"],
        ["a 2 line", "step 3"],
    ):
        with pytest.raises(AssertionError):
            assert_prints("x", wrong, printed)
    assert_prints("jaxgpt sample x", ["anything", "step 3"], "another\ntext\nstep 4\n")


def test_the_readme_is_short_and_says_at_once_what_it_is_and_what_to_type() -> None:
    assert len(TEXT.split()) <= MAX_WORDS
    first = [line for line in TEXT.split("\n") if line.strip()][:FIRST_SCREEN]
    assert "INT8" in first[1]
    assert any(line.startswith("    make demo") for line in first)
    assert any(line.startswith("![") and ".svg" in line for line in first)
    headings = re.findall(r"(?m)^## (.*)", TEXT)
    assert headings == [
        "Install", "Five commands", "Python", "How to", "What is where", "Limits", "Pages",
    ]  # fmt: skip
    assert len(re.findall(r"(?m)^### ", TEXT)) == 3


def test_each_page_of_a_task_begins_with_its_command() -> None:
    names = (
        "results",
        "samples",
        "reproduction",
        "training",
        "data",
        "deployment",
        "quantization",
        "engine",
        "multi-gpu",
    )
    for name in names:
        title, first, *_ = [line for line in page_text(name).split("\n") if line.strip()]
        assert title.startswith("# "), name
        assert re.match(r"`{3,}console|    jaxgpt", first), f"docs/{name}.md begins with {first!r}"


def test_commands_in_the_running_text_exist_with_their_options(command: Command, tmp_path: Path) -> None:
    # A command and its arguments, in code spans or in lines of their own.
    inline = [
        text
        for page in PAGES
        for text in re.findall(r"`([^`\n]+)`", prose(page))
        + re.findall(r"(?m)^    (jaxgpt[a-z-]* .*)", prose(page))
        if re.match(r"jaxgpt(-export|-bench)? [a-z]", text)
    ]
    assert len(inline) >= 20
    trainings = [text for text in inline if re.fullmatch(r"jaxgpt train \w+ --data \S+ --out \S+", text)]
    assert trainings
    for text in inline:
        program, _, rest = text.partition(" ")
        if text in trainings:
            words = [*rest.split()[:2], "--data", tmp_path / "none", "--out", tmp_path / "run"]
            # The options were taken: what is missed is the data.
            assert_one_line_error(command(program, *words), "dataset folder", "is missing")
        elif rest and not rest.startswith("-"):
            assert rest.split()[0] in command(program, "--help")[2], text


def test_batches_of_trainings_that_are_shown_divide_over_their_mesh() -> None:
    shown = [
        found
        for page in PAGES
        for found in re.findall(
            r"jaxgpt (train .*--mesh .*)", page.read_text(encoding="utf-8").replace("\\\n", " ")
        )
    ]
    assert len(shown) >= 4
    for text in shown:
        options = parse(TrainOptions, "jaxgpt train", shlex.split(text.partition("#")[0])[1:])
        devices = math.prod(int(axis.partition("=")[2]) for axis in options.devices.mesh.split(","))
        _require_even_split(train_config(options.training), devices)


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        name
        for page in PAGES
        for name in re.findall(
            r"(?:`|^    )make ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    }
    assert named >= {"demo", "setup"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


PACKAGES = (ROOT / "jaxgpt", ROOT / "export" / "jaxgpt_export", ROOT / "bench" / "jaxgpt_bench")


def test_the_map_has_ten_lines_and_names_what_lies_at_the_top() -> None:
    found = TEXT.partition("## What is where")[2].partition("## ")[0]
    lines = [line.split()[0] for line in found.split("\n") if line.strip()]
    assert len(lines) <= 10
    for path in lines:
        assert (ROOT / path).exists(), path
    for folder in (
        *PACKAGES,
        ROOT / "export" / "native",
        ROOT / "bench" / "results",
        ROOT / "docs",
        ROOT / "tests",
    ):
        assert f"{folder.relative_to(ROOT)}/" in lines


def test_docs_structure_names_every_room() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in package.rglob("*/__init__.py"):
            assert re.search(rf"\b{path.parent.name}\b", text), f"{path.parent} is not in docs/structure.md"
        for path in package.glob("*.py"):
            if not path.name.startswith("_") and path.name != "cli.py":
                assert re.search(rf"\b{path.stem}\b", text), f"{path} is not in docs/structure.md"


def test_every_file_that_a_page_links_to_exists() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", prose(page))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert missing == []


def prose(page: Path) -> str:
    """A page without its fenced blocks, whose brackets are no links."""
    return re.sub(r"(?ms)^(`{3,}|~{3,})\w*\n.*?^\1$", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names by which GitHub finds a page's headings."""
    titles = re.findall(r"(?m)^#+ (.*)", prose(page))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_heading_that_a_page_links_to_exists() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {link}#{anchor}"
        for page in PAGES
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose(page))
        if "://" not in link and anchor not in anchors(page.parent / link if link else page)
    ]
    assert missing == []


def test_every_path_and_module_that_a_page_names_exists() -> None:
    """In code spans: files of the packages, and python -m names."""
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        for path in re.findall(
            r"`((?:jaxgpt|export|bench|tests)/[\w/]+\.\w+)`", page.read_text(encoding="utf-8")
        )
        if "NAME" not in path and not (ROOT / path).exists()
    ]
    assert missing == []


def commands_with_flags() -> dict[tuple[str, ...], set[str]]:
    """Return every command that pages and scripts name, with the flags that they give it."""
    found: dict[tuple[str, ...], set[str]] = {}
    for path in [*PAGES, *(ROOT / "bench").glob("*.sh")]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for program, name, rest in re.findall(r"\b(jaxgpt(?:-export|-bench)?) ([a-z][a-z-]+)([^`\n]*)", text):
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))
            # `jaxgpt train PRESET` and `jaxgpt plan PRESET` show the options of a preset.
            preset = ("tiny",) if (program, name) in (("jaxgpt", "train"), ("jaxgpt", "plan")) else ()
            if flags:
                found.setdefault((program, name, *preset), set()).update(flags - {"--help"})
    return found


def test_flags_that_pages_and_scripts_give_are_in_the_commands_help(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names that help shows, not by those that were renamed and are still taken."""
    monkeypatch.setenv("COLUMNS", "200")
    named = commands_with_flags()
    assert len(named) >= 15
    unknown = []
    for (program, *words), flags in named.items():
        capfd.readouterr()
        with contextlib.suppress(SystemExit):
            run_command(program, *words, "--help")
        shown = set(re.findall(r"--[a-z][a-z-]*", "".join(capfd.readouterr())))
        unknown += [f"{program} {' '.join(words)}: {flag}" for flag in sorted(flags - shown)]
    assert unknown == []
