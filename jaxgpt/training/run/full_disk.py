"""A disk that is full, or fails, while a run is written: one line says so, whichever library met it first.

Orbax and TensorStore save in threads of their own and wrap the system's error in several kinds; what they,
and TensorBoard's writer, print about it besides is left out.
"""

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What ends a write for want of room: the device, a quota, a limit of the shell.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What ends it otherwise: a broken disk, one that became read-only, a server that came again.
FAILED = (errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES)


@contextlib.contextmanager
def told_as_os_error(path: Path, what: str) -> Iterator[None]:
    """Raise an OSError that names a path where the system ends the block's write; other errors pass.

    Args:
      path: that is written to.
      what: is written, such as "a checkpoint of 1,492,320 bytes".
    """
    try:
        yield
    except Exception as error:
        found = _error_number(error)
        if found is None:
            raise
        raise OSError(found, f"{os.strerror(found)} for {what}", str(path)) from error


def _error_number(error: BaseException) -> int | None:
    known = FULL + FAILED
    if isinstance(error, OSError) and error.errno in known:
        return error.errno
    return next((number for number in known if os.strerror(number) in str(error)), None)


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Leave out what threads and tasks print that can't write, or are called back by a save that failed."""
    unraisable, uncaught = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = _without_known(unraisable)
    threading.excepthook = _without_known(uncaught)
    tasks = logging.getLogger("asyncio")
    tasks.addFilter(_says_more)
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = unraisable, uncaught
        tasks.removeFilter(_says_more)


def _says_more(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not _ended_a_write(error)


def _ended_a_write(error: BaseException) -> bool:
    """Whether the save tells of it; of permissions and servers the thread itself may tell alone."""
    return _error_number(error) in (*FULL, errno.EIO, errno.EROFS)


def _without_known(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def shown(lost: Any) -> None:
        known = lost.exc_value is not None and _ended_a_write(lost.exc_value)
        if not known and str(lost.exc_value) != "Event loop is closed":  # asyncio's, after a save that failed
            hook(lost)

    return shown
