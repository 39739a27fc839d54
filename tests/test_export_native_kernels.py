"""Kernels of all instruction sets agree: tests/native/, compiled with the engine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from jaxgpt_export.native.library import instruction_sets

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "export" / "native"
CHECKS = ROOT / "tests" / "native"
# setup.py's, but for -O1: contraction changes results, the level does not.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", "-pthread", f"-I{NATIVE}")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compiled(compiler: str, folder: Path, *flags: str) -> Path:
    """Compile the checks with every source of the engine."""
    program = folder / "check_kernels"
    sources = sorted(str(path) for folder in (CHECKS, NATIVE) for path in folder.glob("**/*.cpp"))
    command = [compiler, *FLAGS, *flags, *sources, "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


def checked(*command: str | Path) -> list[str]:
    """Run the driver; return the instruction sets that it compared."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


def test_every_instruction_set_of_this_machine_computes_the_same(tmp_path: Path) -> None:
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++ or c++)")
    assert checked(compiled(compiler, tmp_path))[-1] == "portable"
    assert instruction_sets(), "the engine was not built here, though a compiler is: run `make setup` again"


@pytest.mark.slow
def test_the_kernels_do_nothing_undefined(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    flags = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    assert checked(compiled("g++", tmp_path, *flags))[-1] == "portable"


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} to compile or to run for ARM")
    return compiled(ARM_COMPILER, tmp_path_factory.mktemp("arm"), "-static")


@pytest.mark.slow
def test_neon_computes_the_same_as_portable(arm_program: Path) -> None:
    assert checked(ARM_EMULATOR, "-cpu", "max", arm_program) == ["neon-dotprod", "portable"]


@pytest.mark.slow
def test_a_processor_without_the_dot_product_gets_the_portable_kernels(arm_program: Path) -> None:
    assert checked(ARM_EMULATOR, "-cpu", "cortex-a53", arm_program) == ["portable"]
