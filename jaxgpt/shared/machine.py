"""What this machine gives a process: cores, quotas, memory, JAX's platform. The one place that asks for them.

A container's limits count: Linux keeps them in the control group below /sys/fs/cgroup. Standard library only.
"""

import math
import os
import traceback
from collections.abc import MutableMapping
from pathlib import Path

from jaxgpt.shared.errors import UserError, quoted

CONTROL_GROUP = Path("/sys/fs/cgroup")
# The types of this project are written out for JAX as it is without these, arrays go to devices where its
# code says so, and checkpoints hold keys of its default generator. They are of the programs that they were
# set for.
OF_OTHER_PROGRAMS = (
    "JAX_ENABLE_X64",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_TRANSFER_GUARD",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST",
)
# Of a GPU's memory: JAX's own choice (docs.jax.dev, "GPU memory allocation"), and what may name another.
ALLOCATOR_SHARE = 0.75
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older


def user_cache_folder() -> Path:
    """Return the folder for what can be made again: JAXGPT_CACHE, else ~/.cache/jaxgpt (XDG_CACHE_HOME)."""
    if own := os.environ.get("JAXGPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgpt"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def schedulable_cores() -> int:
    """Return on how many cores the threads of this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its control group."""
    return max(1, int(min(schedulable_cores(), cpu_quota(CONTROL_GROUP))))


def cpu_quota(root: Path) -> float:
    """Return the cores that a control group allows, such as 1.5; infinity without a limit.

    Args:
      root: its folder: cpu.max of version 2, or cpu/cpu.cfs_*_us of version 1.
    """
    try:
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()[:2]
        return math.inf if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        allowed = float((root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period_us = float((root / "cpu" / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return math.inf
    return allowed / period_us if allowed > 0 else math.inf


def system_free_bytes() -> float | None:
    """Return the bytes that the system can give without swapping; None where it has no /proc/meminfo."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None


def control_group_free_bytes(root: Path = CONTROL_GROUP) -> float | None:
    """Return the bytes that are left of a control group's memory limit; None without a limit.

    Args:
      root: its folder, of version 2.
    """
    try:
        limit = float((root / "memory.max").read_text(encoding="ascii"))
        used = float((root / "memory.current").read_text(encoding="ascii"))
        lines = (root / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    cache = sum(float(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return limit - used + cache  # cached files make room


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


def allocator_share() -> float:
    """Return the share of a GPU's memory that JAX's allocator takes, which an environment variable may name.

    Raises:
      UserError: the variable holds no share, or both are set.
    """
    given = {name: text for name in SHARE_VARIABLES if (text := os.environ.get(name, ""))}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both set, which JAX refuses; leave the second out")
    for name, text in given.items():
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share < math.inf:  # above 1 where memory is unified
            raise UserError(f"{name} is {quoted(text)}; expected a share of a GPU's memory, such as 0.9")
        return share
    return ALLOCATOR_SHARE
