"""What machine a figure comes from, and how fast it reads memory."""

import contextlib
import datetime
import importlib.metadata
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from export.engine import instruction_sets
from export.engine import read_bandwidth as engine_read_bandwidth

PACKAGES = (
    *("jax", "flax", "torch", "transformers", "numpy"),
    *("onnxruntime", "openvino", "ctranslate2", "llama-cpp-python"),  # peers
)
READ_PASSES = 15
SMALLEST_BUFFER = 1 << 20


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores this process may use, memory, system and package versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instruction_sets": [flag for flag in _cpu_flags() if flag in _INTERESTING],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


_INTERESTING = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags", "Features").split()


def provenance() -> dict[str, Any]:
    """Return what every committed result carries: machine, date, commit and command."""
    return {
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["jaxgpt-bench", *sys.argv[1:]]),
    }


def commit() -> str:
    """Return the commit of the source tree, with "-dirty" when it was changed; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def read_bandwidth(buffer_bytes: int, threads: int) -> float:
    """Measure how fast this machine reads a buffer again and again.

    The median of many passes over huge pages, as an engine's tokens are a mean over many steps: the native
    engine's own reading loop (vector loads with far prefetches), or without that engine torch.sum and
    torch.amax. On pages of 4 KiB the same read is slower. A buffer of the size of a model's weights is the
    fair ceiling for generation: where such a buffer stays in the cache, so do the weights.

    Args:
      buffer_bytes: its size.
      threads: that read.

    Returns:
      10^9 bytes a second.
    """
    if instruction_sets():
        return engine_read_bandwidth(max(buffer_bytes, SMALLEST_BUFFER), threads, READ_PASSES)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = _huge_buffer(max(buffer_bytes // 4, 1024))
        rates = []
        for operator in (torch.sum, torch.amax):
            for _ in range(READ_PASSES):
                started = time.perf_counter()
                operator(buffer)
                rates.append(buffer.numel() * 4 / (time.perf_counter() - started) / 1e9)
        return statistics.median(rates)
    finally:
        torch.set_num_threads(before)


def _huge_buffer(count: int) -> torch.Tensor:
    """Return so many ones in float32, in huge pages where the system gives them."""
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)
