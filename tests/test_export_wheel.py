"""A wheel carries the engine, so that a machine without a compiler runs it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jaxgpt_export.native.library import instruction_sets

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_a_wheel_runs_the_engine_where_no_compiler_is(int8_dynamic: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("jaxgpt-*.whl")
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "jaxgpt_export/native/libengine.so" in names
    assert "jaxgpt_bench/reproduce/recipes/answers-packages.txt" in names
    assert not any(name.endswith((".cpp", ".inl")) or name.startswith("tests/") for name in names)
    # Another folder, no compiler on the path, and nothing of this checkout.
    (tmp_path / "bin").mkdir()
    environment = {
        **os.environ,
        "PATH": str(tmp_path / "bin"),
        "PYTHONPATH": str(tmp_path / "site"),
        "CC": "none",
    }
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, env=environment
    )
    code = (
        "import sys, jaxgpt_export as e; assert e.__file__.startswith(sys.argv[1]), e.__file__\n"
        "from jaxgpt_export.cli import main\n"
        "sys.exit(main(['generate', '--artifact', sys.argv[2], '--engine', 'native']))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "site"), str(int8_dynamic)]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jaxgpt-native" in done.stderr
