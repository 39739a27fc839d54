"""The C library's settings for XLA on the CPU."""

import ctypes

from jaxgpt.shared.config import ModelConfig, TrainConfig

# <malloc.h> of glibc, <sys/mman.h> of Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE = 2**21
THREAD_HEAP_BYTES = 2**26  # of glibc: larger buffers of a thread come from the system each time


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
    logits = train.batch_size // train.grad_accum_steps * model.block_size * model.vocab_size * 4
    # Muon's largest stack of matrices: those from C to 4 C channels of all blocks.
    stack = 4 * model.n_layer * model.n_embd**2 * 4 if train.optimizer == "muon" else 0
    if max(logits // (devices * train.loss_chunks), stack) > THREAD_HEAP_BYTES:
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
