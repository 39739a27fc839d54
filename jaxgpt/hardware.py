"""What the devices can do: the best precision, peak rates, free memory, and the work of a token.

Peak rates are the dense ones of NVIDIA's datasheets (which print twice as much "with sparsity").
"""

import ctypes
import math
from pathlib import Path

import jax

from jaxgpt.config import ModelConfig, Precision, TrainConfig
from jaxgpt.model import abstract_params

# (part of the device kind, 10^12 FLOP/s of matrix products in float32, in float16, in bfloat16); the first
# that fits counts. float32 is TensorFloat-32 where the device has it: JAX's default products use it.
PEAK_TFLOPS: tuple[tuple[str, float, float, float | None], ...] = (
    ("T4", 8.1, 65.0, None),
    ("V100-PCIE", 14.0, 112.0, None),
    ("V100", 15.7, 125.0, None),
    ("L4", 60.5, 121.0, 121.0),
    ("A100", 156.0, 312.0, 312.0),
    ("H100 PCIe", 378.0, 756.0, 756.0),
    ("H100 NVL", 417.5, 835.0, 835.0),
    ("H100", 494.7, 989.4, 989.4),
    ("H200 NVL", 417.5, 835.0, 835.0),
    ("H200", 494.7, 989.4, 989.4),
)

# <malloc.h> of glibc, <sys/mman.h> of Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE = 2**21
THREAD_HEAP_BYTES = 2**26  # of glibc: larger buffers of a thread come from the system each time


def best_precision() -> Precision:
    """Return what this device multiplies matrices best in: fp32, bf16 or fp16.

    NVIDIA GPUs multiply bfloat16 from compute capability 8.0 on (A100), float16 from 7.0 on (V100, T4).
    """
    if jax.default_backend() == "cpu":
        return "fp32"
    capability = compute_capability() if jax.default_backend() == "gpu" else 8.0  # a TPU has bfloat16
    return "bf16" if capability >= 8.0 else "fp16" if capability >= 7.0 else "fp32"


def compute_capability() -> float:
    """Return the CUDA compute capability of this process's devices; 0.0 where there is none."""
    return float(getattr(jax.local_devices()[0], "compute_capability", 0.0))


def peak_flops(device_kind: str, precision: Precision) -> float | None:
    """Return the FLOP/s of one device in matrix products; None where no datasheet is known.

    Args:
      device_kind: as JAX names it, such as "NVIDIA A100-SXM4-40GB" or "Tesla T4".
      precision: of the products.
    """
    words = device_kind.replace("-", " ").split()
    for part, *rates in PEAK_TFLOPS:
        wanted = part.replace("-", " ").split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            rate = rates[("fp32", "fp16", "bf16").index(precision)]
            return None if rate is None else rate * 1e12
    return None


def flops_per_token(model: ModelConfig) -> float:
    """Return the floating point operations of training on one token.

    6 for each parameter that takes part in a product (wpe does not, wte only as the head), and 12 * layers *
    channels * context for attention (the whole square, as is usual, though half of it is masked).

    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    counts = {name: math.prod(leaf.shape) for name, leaf in abstract_params(model).items()}
    looked_up = "wpe." if model.tied else ("wpe.", "wte.")
    used = sum(count for name, count in counts.items() if not name.startswith(looked_up))
    return 6.0 * used + 12.0 * model.n_layer * model.n_embd * model.block_size


def free_device_bytes() -> float | None:
    """Return the bytes that a device of this process can still give; None where that is not known.

    A GPU's is what JAX's allocator may take. Simulated CPU devices share the memory that the system, and
    the control group of a container, have left.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    free = [left for left in (_system_bytes(), _control_group_bytes()) if left is not None]
    return min(free) / jax.local_device_count() if free else None


def _system_bytes() -> float | None:
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None


def _control_group_bytes() -> float | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = float((folder / "memory.max").read_text(encoding="ascii"))
        used = float((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    cache = sum(float(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return limit - used + cache  # cached files make room


def keep_freed_memory(model: ModelConfig, train: TrainConfig, devices: int) -> None:
    """Let the C library keep what XLA frees after a step on the CPU; call it before JAX starts its threads.

    glibc returns large buffers to the system and takes them again page by page, zeroed: 240,000 page faults
    a step of `tiny` at 50,257 tokens. Buffers that no thread's own heap can hold are kept only where all
    threads share one heap; without such buffers that would make them wait for each other (190 instead of
    154 cpu-ms a step of `tiny` at 2,048 tokens on two devices). Nothing happens where the C library is
    another.

    Args:
      model: shape.
      train: settings.
      devices: simulated on the CPU.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**28}
    logits = train.batch_size // train.accumulate * model.block_size * model.vocab_size * 4
    if logits // (devices * train.loss_chunks) > THREAD_HEAP_BYTES:
        settings[M_ARENA_MAX] = 1
    for parameter, value in settings.items():
        libc.mallopt(parameter, value)


def reserve_memory(count: float) -> None:
    """Name a region that the next buffers come from, in huge pages where the system allows.

    With keep_freed_memory 1280 instead of 1801 cpu-ms a step of `tiny` at 50,257 tokens. Memory is taken
    when it is first written, not here.

    Args:
      count: bytes that a step needs on all devices of this process.
    """
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("malloc", "free", "madvise")):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = int(1.5 * count) + 2**28
    start = libc.malloc(size)
    if start:
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (start + size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(start)
