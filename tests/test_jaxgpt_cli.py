"""The command `jaxgpt` itself: what asking for help costs."""

import subprocess

import pytest
from conftest import python

from jaxgpt.cli import COMMANDS

HEAVY = ("jax", "flax", "optax", "orbax", "torch", "datasets", "huggingface_hub", "tokenizers")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_neither_jax_nor_pytorch_nor_datasets(name: str) -> None:
    code = f"""
import sys
from jaxgpt.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as stop:
    assert not stop.code
print("heavy:", [module for module in {HEAVY!r} if module in sys.modules])
"""
    arguments, environment = python(code)
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    assert f"usage: jaxgpt {name}" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"
