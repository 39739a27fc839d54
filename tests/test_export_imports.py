"""What runs without PyTorch: reading and checking artifacts, the native engine, every command's help."""

import subprocess
from pathlib import Path

import pytest
from conftest import python
from jaxgpt_export.cli import COMMANDS
from jaxgpt_export.native.library import instruction_sets
from test_export_generate import BLOCK
from tiny_artifacts import tiny_artifacts

HEAVY = {"torch", "transformers", "jax", "jaxlib", "flax", "optax", "orbax"}


def run_blocked(code: str) -> str:
    """Run code where neither PyTorch nor JAX can be imported; return what it prints."""
    line, environment = python(BLOCK.format(blocked=HEAVY) + code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("imports"))


def test_every_artifact_is_read_and_checked_without_pytorch(folders: dict[str, Path]) -> None:
    code = f"""
from pathlib import Path
from jaxgpt_export import read_artifact
from jaxgpt_export.format.artifact import read_certified_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.format.probe import read_probe
for kind, folder in {[(kind, str(folder)) for kind, folder in folders.items()]!r}:
    artifact = read_certified_artifact(Path(folder))
    assert artifact.kind == kind == read_certificate(Path(folder))["kind"] == read_artifact(Path(folder)).kind
    assert artifact.tokenizer().vocab_size == artifact.config.vocab_size
    assert len(read_probe(artifact).logits)
    print(kind)
"""
    assert run_blocked(code).split() == list(folders)


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_the_native_engine_generates_without_pytorch(folders: dict[str, Path]) -> None:
    artifacts = [str(folder) for folder in folders.values()]
    code = f"""
from jaxgpt_export.cli import main
for folder in {artifacts!r}:
    for engine in ("native", "auto"):
        arguments = ["--artifact", folder, "--engine", engine, "--max-new-tokens", "3", "--json"]
        assert main(["generate", *arguments]) == 0
"""
    assert run_blocked(code).count('"engine": "jaxgpt-native') == 2 * len(artifacts)


def test_help_of_every_command_needs_neither_pytorch_nor_jax() -> None:
    code = f"""
import sys
from jaxgpt_export.cli import main
for name in {list(COMMANDS)!r}:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code in (0, None), name
    else:
        raise AssertionError(f"{{name}} --help went on")
assert not {HEAVY!r} & sys.modules.keys()
"""
    shown = run_blocked(code)
    assert all(f"usage: jaxgpt-export {name}" in shown for name in COMMANDS)
