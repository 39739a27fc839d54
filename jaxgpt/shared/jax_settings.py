"""What the environment says to JAX where that would end a command in JAX's own words. JAX is not imported."""

import os
import traceback
from collections.abc import MutableMapping

# The types of this project are written out for JAX as it is without these, and arrays go to devices where its
# code says so. They are of the programs that they were set for.
OF_OTHER_PROGRAMS = (
    "JAX_ENABLE_X64",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_TRANSFER_GUARD",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST",
)


def leave_out_settings(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take what is of other programs out of the environment, before JAX reads it."""
    for name in OF_OTHER_PROGRAMS:
        environment.pop(name, None)


def missing_platform(error: BaseException) -> str | None:
    """Return a line that says which platform JAX was told to use and has not; None for any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return None
    wanted = os.environ.get("JAX_PLATFORMS", "")
    said = " ".join(str(error).split())[:160]
    return (
        f"JAX finds no device for JAX_PLATFORMS={wanted!r}{f' ({said})' if said else ''}; unset it, so that "
        "JAX takes what is there, or install its plugin (for GPUs the extra cuda)"
    )
