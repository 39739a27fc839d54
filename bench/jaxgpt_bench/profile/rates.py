"""What the device reaches at best: a plain matrix product, a plain copy, both by JAX."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

PRODUCT_SIZE = {"cpu": 1024, "gpu": 8192}  # rows and columns
COPY_BYTES = {"cpu": 2**27, "gpu": 2**29}  # more than any cache holds
PASSES = 5
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32, "tf32": jnp.float32}


def product_rate(dtype: str) -> float:
    """Return the best FLOP/s of several square products.

    Args:
      dtype: bf16, fp16, fp32 or tf32.
    """
    size = PRODUCT_SIZE[_platform()]
    precision = jax.lax.Precision.HIGHEST if dtype == "fp32" else jax.lax.Precision.DEFAULT
    a = jnp.ones((size, size), DTYPES[dtype])
    multiply = _multiplication(precision)
    return 2 * size**3 / _shortest(lambda: multiply(a))


@functools.cache
def _multiplication(precision: jax.lax.Precision) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: jnp.matmul(x, x, precision=precision))


def copy_rate() -> float | None:
    """Return the best bytes/s of several passes that read and write an array; None without memory."""
    try:
        a = jnp.ones(COPY_BYTES[_platform()] // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new pages to be taken from the system
        size = a.nbytes

        def again() -> jax.Array:
            nonlocal a
            a = add(a)
            return a

        return 2 * size / _shortest(again)
    except RuntimeError:
        return None


def _shortest(call: Callable[[], jax.Array]) -> float:
    call().block_until_ready()
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times)


def _platform() -> str:
    return "gpu" if jax.default_backend() == "gpu" else "cpu"
