"""How much memory a device has left."""

import jax

from jaxgpt.shared.machine import control_group_free_bytes, system_free_bytes


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
