"""Locks between processes: files that the system locks, and unlocks when a process ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxgpt.shared.errors import UserError


@contextlib.contextmanager
def lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock until the block or the process ends, however it ends.

    Args:
      path: the lock's file, made if it is not there; its folder must exist.
      refusal: what to say when another process holds it.

    Raises:
      UserError: another process holds it.
    """
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(refusal) from None
            if not _is_still(file.fileno(), path):  # its last holder removed it since: another may lock anew
                continue
            yield
            return


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def wait_for_lock(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a lock as `lock` does, but wait for a process that holds it.

    Args:
      path: the lock's file, made if it is not there, with its folder.
      waiting: called when another process holds it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(file.fileno(), path):  # its last holder removed it, and perhaps the folder
                continue
            yield
            return


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock, this one included; several may ask at once."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
