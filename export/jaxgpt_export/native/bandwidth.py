"""How fast memory is read: the ceiling of a decode step."""

import numpy as np

from jaxgpt_export.native.library import call_engine

WARM_PASSES = 3


def read_bandwidth(size: int, threads: int, passes: int = 15) -> float:
    """Measure how fast threads read a buffer on huge pages, as a decode step reads weights.

    Some passes before are not counted: they bring what fits into the caches.

    Returns:
      10^9 bytes a second, the median of the passes.
    """
    seconds = np.empty(passes + WARM_PASSES, dtype=np.float64)
    call_engine("jaxgpt_read_seconds", size, threads, len(seconds), seconds.ctypes.data)
    return float(size / np.median(seconds[WARM_PASSES:]) / 1e9)
