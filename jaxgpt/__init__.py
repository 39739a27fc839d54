"""Training: a Flax GPT-2, data-parallel over the devices that JAX finds.

This package never imports torch, jaxgpt_export or jaxgpt_bench. `jaxgpt.shared` and `jaxgpt.generation`
import neither JAX nor PyTorch, so that the other packages may use them anywhere.
"""

__version__ = "0.1.0"
