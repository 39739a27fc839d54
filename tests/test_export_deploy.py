"""The extra [deploy]: an environment that runs a quantized artifact, and how large it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_MB = 150


@pytest.mark.slow
def test_a_fresh_deploy_environment_runs_an_artifact_and_takes_at_most_150_mb(
    int8_dynamic: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, env=environment)
    binaries = tmp_path / "venv" / "bin"
    pip = [binaries / "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(wheel, check=True, env=environment)
    (built,) = tmp_path.glob("jaxgpt-*.whl")
    install = [*pip, "install", "-c", ROOT / "constraints.txt", f"{built}[deploy]"]
    subprocess.run(install, check=True, env=environment)
    files = [path for path in (tmp_path / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    assert size_mb <= MOST_MB, f"{size_mb:.0f} MB"
    assert not list((tmp_path / "venv").glob("lib/*/site-packages/torch"))
    code = (
        "from jaxgpt_export.llm import LLM; import sys\n"
        "llm = LLM.load(sys.argv[1]); print(llm.engine); print(llm.generate('return', max_new_tokens=5))"
    )
    done = subprocess.run(
        [binaries / "python", "-c", code, int8_dynamic],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jaxgpt-native")
    command = [binaries / "jaxgpt-export", "generate", "--artifact", int8_dynamic, "--prompt", "return"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
