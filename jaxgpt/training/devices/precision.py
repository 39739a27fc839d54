"""What a device multiplies matrices best in, and its peak rate.

Peak rates are the dense ones of NVIDIA's datasheets (which print twice as much "with sparsity").
"""

import jax

from jaxgpt.shared.config import Precision

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


def best_precision() -> Precision:
    """Return what this device multiplies matrices best in: fp32, bf16 or fp16.

    NVIDIA GPUs multiply bfloat16 from compute capability 8.0 on (A100), float16 from 7.0 on (V100, T4).
    """
    if jax.default_backend() == "cpu":
        return "fp32"
    capability = compute_capability() if jax.default_backend() == "gpu" else 8.0  # a TPU has bfloat16
    return "bf16" if capability >= 8.0 else "fp16" if capability >= 7.0 else "fp32"


def compute_capability() -> float:
    """Return the CUDA compute capability of this process's devices; 0.0 where there is none (CPU, ROCm)."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0.0))
    except ValueError:  # AMD's have names, such as gfx90a
        return 0.0


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
