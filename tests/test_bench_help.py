"""A command tells its options without the seconds that JAX and PyTorch take to be imported."""

import subprocess

import pytest
from conftest import python
from jaxgpt_bench.cli import COMMANDS

HEAVY = ("jax", "torch", "transformers", "matplotlib")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    code = f"""
import sys
from jaxgpt_bench.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as end:
    assert not end.code
sys.exit(", ".join(name for name in {HEAVY} if name in sys.modules))
"""
    done = subprocess.run(python(code)[0], env=python("")[1], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "usage" in done.stdout
