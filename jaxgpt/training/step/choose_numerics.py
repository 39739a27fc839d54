"""How a model is trained on a device: the numerics that fit both."""

import jax.numpy as jnp

from jaxgpt.shared.config import ModelConfig, Precision
from jaxgpt.training.model.numerics import Numerics

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
FLASH_CAPABILITY = 8.0  # cuDNN's fused attention needs an A100 or newer
MAX_FLASH_HEAD_SIZE = 128


def choose_numerics(
    model: ModelConfig, precision: Precision, platform: str, capability: float
) -> tuple[Numerics, str]:
    """Decide how a model is trained on a device.

    Args:
      model: shape.
      precision: of matrix products.
      platform: of the device: cpu, gpu.
      capability: CUDA compute capability; 0 where there is none.

    Returns:
      The numerics, and why attention is flash or not.
    """
    size = model.head_size
    obstacles = {
        f"the device is a {platform}, no GPU": platform != "gpu",
        f"compute capability {capability} is below {FLASH_CAPABILITY}": platform == "gpu"
        and capability < FLASH_CAPABILITY,
        "precision is fp32": precision == "fp32",
        f"head size {size} is no multiple of 8 up to {MAX_FLASH_HEAD_SIZE}": size % 8 > 0
        or size > MAX_FLASH_HEAD_SIZE,
        f"block_size {model.block_size} is odd": model.block_size % 2 > 0,
        "dropout acts on attention weights": model.dropout > 0,
    }
    found = [text for text, true in obstacles.items() if true]
    reason = f"attention by XLA ({found[0]})" if found else "flash attention by cuDNN"
    return Numerics(compute=COMPUTE_DTYPES[precision], flash=not found), reason
