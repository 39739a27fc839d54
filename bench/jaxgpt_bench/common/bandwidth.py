"""Read bandwidth, with or without the native engine."""

import contextlib
import mmap
import statistics
import time

import torch
from jaxgpt_export.native.bandwidth import read_bandwidth as engine_read_bandwidth
from jaxgpt_export.native.library import instruction_sets

READ_PASSES = 15
SMALLEST_BUFFER, LARGE_BUFFER = 1 << 20, 1_000_000_000  # bytes


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
