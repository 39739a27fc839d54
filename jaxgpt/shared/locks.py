"""Locks between processes: files that the system locks, and unlocks when a process ends, however it ends.

Some file systems lock no files: Lustre without its option flock, NFS without its lock service. Nothing keeps
processes apart there, which is said.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxgpt.shared.errors import UserError

# What flock answers where another process holds a lock.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def take(file: IO[Any], how: int) -> str | None:
    """Lock an open file.

    Args:
      file: to lock, until it is closed.
      how: of fcntl.flock.

    Returns:
      None, or why its file system locks no files.

    Raises:
      BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(error.errno, error.strerror) from None
        return error.strerror or str(error)
    return None


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
                missing = take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(refusal) from None
            if missing:
                _say_unlocked(path, missing)
            elif not _is_still(file.fileno(), path):  # its last holder removed it: another may lock anew
                continue
            yield
            return


def _say_unlocked(path: Path, why: str) -> None:
    sys.stderr.write(  # console.py imports this file
        f"WARNING: the file system of {path.parent} locks no files ({why}); see to it yourself that no other "
        "process writes there\n"
    )


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
                missing = take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                missing = take(file, fcntl.LOCK_EX)
            if missing:
                _say_unlocked(path, missing)
            elif not _is_still(file.fileno(), path):  # its last holder removed it, and perhaps the folder
                continue
            yield
            return


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock, this one included; several may ask at once.

    Where the file system locks no files, a lock's file counts as one that is held.
    """
    try:
        with path.open("r") as file:
            return take(file, fcntl.LOCK_SH | fcntl.LOCK_NB) is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True
