"""Compiled programs that are kept on disk, so that the next start takes them from there.

    with compilation_cache():
        ...  # what JAX compiles here is kept, and not compiled again in the next process

JAX keeps them by their program, compiler, flags and device. What a CPU's program depends on besides is the
number of cores, so those of each number have a folder. JAX's settings are as before when this is closed.

Several processes on GPUs must find the same programs: one that finds none compiles, and XLA, which shares the
search for kernels among the processes, has it wait for the others. So what they keep is never thrown out, and
read without a lock, which JAX gives up after some seconds.
Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import schedulable_cores, user_cache_folder

LIMITS = {
    "jax_compilation_cache_max_size": 2**30,  # bytes; what was not used for longest makes room
    "jax_persistent_cache_min_compile_time_secs": 0.1,  # what compiles faster is not kept
}
UNBOUNDED = -1  # JAX's word for a cache without limit and lock
LOCK_TIMEOUT_S = 10  # as long as JAX waits for the lock of the folder


@contextlib.contextmanager
def compilation_cache(where: str = "auto") -> Iterator[None]:
    """Keep what JAX compiles while this is open, and take what was compiled before.

    Args:
      where: "none", a folder (with several processes one that all see), or "auto": what the user told JAX
        itself (JAX_COMPILATION_CACHE_DIR), else the user's cache folder; with several processes nothing, on
        GPUs not even what JAX was told.

    Raises:
      UserError: nothing can be written into the folder that was given.
    """
    own, several = jax.config.values["jax_compilation_cache_dir"], jax.process_count() > 1
    if where == "auto" and several and own and jax.default_backend() == "gpu":
        if jax.process_index() == 0:
            say(f"{own} is left aside, as all processes must find the same programs: --compilation-cache DIR "
                "names a folder that all of them see")  # fmt: skip
        where = "none"
    if where == "auto" and (own or several):
        yield
        return
    folder = None if where == "none" else _usable(where)
    settings: dict[str, Any] = {"jax_compilation_cache_dir": folder and str(folder)}
    settings |= {name: value for name, value in LIMITS.items() if name.upper() not in os.environ}
    if several:
        settings["jax_compilation_cache_max_size"] = UNBOUNDED
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # JAX looks at its settings once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def _usable(where: str) -> Path | None:
    """Return the folder, made and without half-written programs; None, and a line, where that can't be."""
    given = where != "auto"
    root = Path(where).expanduser().absolute() if given else user_cache_folder() / "compiled"
    platform, processes = jax.default_backend(), jax.process_count()
    name = f"cpu-{schedulable_cores()}-cores" if platform == "cpu" else platform
    folder = root / (name if processes == 1 else f"{name}-{processes}-processes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if processes == 1:
            _remove_half_written(folder)
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if given:
            raise UserError(f"--compilation-cache {where}: nothing can be kept there ({reason})") from None
        say(f"compiled programs are not kept: {folder}: {reason} (--compilation-cache DIR moves them)")
        return None
    return folder


def _remove_half_written(folder: Path) -> None:
    """Remove programs that a killed process was writing: a whole one has a file beside it, written later.

    Raises:
      OSError: nothing can be written there, or another process holds the folder's lock for long.
      ImportError: there is no filelock, which JAX needs for a cache of a bounded size.
    """
    import filelock

    with filelock.FileLock(folder / ".lockfile", timeout=LOCK_TIMEOUT_S):  # JAX's own, while it writes
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
