"""How much memory a device has left, and how much of a GPU's JAX takes."""

import os

import jax

from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.machine import control_group_free_bytes, system_free_bytes

ALLOCATOR_SHARE = 0.75  # JAX's own choice, see docs.jax.dev, "GPU memory allocation"
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older


def allocator_share() -> float:
    """Return the share of a GPU's memory that JAX's allocator takes, which an environment variable may name.

    Raises:
      UserError: the variable holds no share.
    """
    for name in SHARE_VARIABLES:
        text = os.environ.get(name, "")
        if not text:
            continue
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(f"{name} is {quoted(text)}; expected a share of a GPU's memory, such as 0.9")
        return share
    return ALLOCATOR_SHARE


def free_device_bytes() -> float | None:
    """Return the bytes that a device of this process can still give; None where that is not known.

    A GPU's is what JAX's allocator may take. Simulated CPU devices share the memory that the system, and
    the control group of a container, have left.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    free = [left for left in (system_free_bytes(), control_group_free_bytes()) if left is not None]
    return min(free) / jax.local_device_count() if free else None
