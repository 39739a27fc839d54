"""The README's commands run as they stand."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error, run_command

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def environment() -> dict[str, str]:
    """Console commands of this interpreter first on PATH; one thread, as on a busy machine."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}{os.pathsep}{ROOT / 'bench'}",
        "JAX_PLATFORMS": "cpu",
    }


def test_the_readme_s_commands_and_python_run_as_they_stand(tmp_path: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 10
    for line in commands:
        # The entry points themselves are installed by `make setup`; -m is the same without an installation.
        program, _, rest = line.partition(" ")
        module = {"jaxgpt": "jaxgpt", "jaxgpt-export": "jaxgpt_export", "jaxgpt-bench": "jaxgpt_bench"}[
            program
        ]
        shell = f'"{sys.executable}" -m {module} {rest}'
        done = subprocess.run(
            shell, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block + "\nassert logits.shape == (1, 3, 2048)"],
            cwd=tmp_path, env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


def test_commands_in_the_running_text_exist_with_their_options(command: Command, tmp_path: Path) -> None:
    inline = [text for text in re.findall(r"`([^`\n]+)`", TEXT) if text.startswith("jaxgpt")]
    assert inline
    for text in inline:
        program, _, rest = text.partition(" ")
        if rest.startswith("train gpt2"):
            words = rest.replace("DATA", str(tmp_path / "none")).replace("RUN", str(tmp_path / "run")).split()
            # The options were taken: what is missed is the data.
            assert_one_line_error(command(program, *words), "dataset folder", "is missing")
        elif rest and not rest.startswith("-"):
            assert rest.split()[0] in command(program, "--help")[2], text


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z]+)", TEXT))
    assert named >= {"demo", "setup"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


PACKAGES = (ROOT / "jaxgpt", ROOT / "export" / "jaxgpt_export", ROOT / "bench" / "jaxgpt_bench")


def test_the_file_tree_names_every_room_and_what_lies_beside_them() -> None:
    tree = TEXT.partition("## What is where")[2].partition("## How it works")[0]
    for package in PACKAGES:
        assert f"{package.relative_to(ROOT)}/" in tree
        for path in package.rglob("*.py"):
            if path.name == "__init__.py" and path.parent != package:
                assert f"{path.parent.name}/" in tree, f"{path.parent} is not in the README's tree"
            elif path.parent == package and not path.name.startswith("_") and path.name != "cli.py":
                assert path.name in tree, f"{path} is not in the README's tree"


def test_docs_structure_names_every_room() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in package.rglob("*/__init__.py"):
            assert re.search(rf"\b{path.parent.name}\b", text), f"{path.parent} is not in docs/structure.md"


def test_every_file_that_a_page_links_to_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert missing == []


def test_every_path_and_module_that_a_page_names_exists() -> None:
    """In code spans: files of the packages, and python -m names."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in pages
        for path in re.findall(
            r"`((?:jaxgpt|export|bench|tests)/[\w/]+\.\w+)`", page.read_text(encoding="utf-8")
        )
        if "NAME" not in path and not (ROOT / path).exists()
    ]
    assert missing == []


def commands_with_flags() -> dict[tuple[str, ...], set[str]]:
    """Return every command that pages and scripts name, with the flags that they give it."""
    found: dict[tuple[str, ...], set[str]] = {}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for path in [*pages, *(ROOT / "bench").glob("*.sh")]:
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
