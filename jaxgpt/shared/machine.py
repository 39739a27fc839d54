"""What this machine gives a process: memory that is left."""

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota(Path("/sys/fs/cgroup")))))


def cpu_quota(root: Path) -> float:
    """Return the cores that a control group allows; infinity without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()[:2]  # version 2
        return math.inf if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        folder = root / "cpu"  # version 1
        allowed = float((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return (
            allowed / float((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
            if allowed > 0
            else math.inf
        )
    except (OSError, ValueError):
        return math.inf


def system_free_bytes() -> float | None:
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None


def control_group_free_bytes() -> float | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = float((folder / "memory.max").read_text(encoding="ascii"))
        used = float((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    cache = sum(float(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return limit - used + cache  # cached files make room
