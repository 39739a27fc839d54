"""The README's commands run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import Command, assert_one_line_error

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


def test_the_file_tree_names_every_module() -> None:
    tree = TEXT.partition("## What is where")[2].partition("## How it works")[0]
    for package in ("jaxgpt", "export"):
        for path in (ROOT / package).iterdir():
            if path.name.startswith(("_", ".")) or path.name in ("cli.py", "ruff.toml"):
                continue
            assert path.name in tree, f"{package}/{path.name} is not in the README's tree"
