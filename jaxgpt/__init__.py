"""Training: a Flax GPT-2, data-parallel over the devices that JAX finds.

This package never imports torch, export or bench. `jaxgpt.shared.config`, `jaxgpt.shared.dataset` and `jaxgpt.shared`
import neither JAX nor PyTorch, so that the other packages may use them anywhere.
"""

__version__ = "0.1.0"
