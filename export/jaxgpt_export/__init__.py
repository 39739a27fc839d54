"""Deployment: artifacts, their PyTorch module, INT8, generation. Runs on a machine without JAX.

import export
model = export.load("runs/demo/int8-dynamic")   # an nn.Module
logits = model(tokens)                          # (B, T) -> (B, T, V)
"""

from jaxgpt_export.format.artifact import load, read_artifact

__all__ = ["load", "read_artifact"]
