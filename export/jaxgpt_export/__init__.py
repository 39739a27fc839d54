"""Deployment: artifacts, their PyTorch module, INT8, generation. Runs on a machine without JAX.

import jaxgpt_export
model = jaxgpt_export.load("runs/demo/int8-dynamic")   # an nn.Module
logits = model(tokens)                                 # (B, T) -> (B, T, V)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import read_artifact as read_artifact
    from jaxgpt_export.model.build import load as load

# Public name -> the module that has it; imported when it is first asked for, as PyTorch takes a second.
_PUBLIC = {"load": "jaxgpt_export.model.build", "read_artifact": "jaxgpt_export.format.artifact"}

__all__ = ["load", "read_artifact"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
