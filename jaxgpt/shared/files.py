"""Files and folders that appear whole or not at all; JSON, hashes and locks.

What is written gets a temporary name beside its target, `.NAME.tmp-PID`, and is renamed at the end: a reader
sees the old content or the new one, never a part. What a killed process leaves behind is removed by the next
command that writes to the same target.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, quoted


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
      path: the file.
      what: the file's role, for the error message.

    Raises:
      UserError: the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} is missing; check the path") from None
    except NotADirectoryError:
        raise UserError(f"{what} {path} is missing: {path.parent} is a file, expected a folder") from None
    except OSError as error:  # a folder, a link to itself, no permission
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, a number of 5000 digits
        raise UserError(f"{what} {path} is not JSON ({error}); it is damaged, make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
      path: target; its folder must exist.
      content: text (UTF-8) or bytes.
    """
    temporary = _temporary(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock until the block or the process ends, however it ends.

    Args:
      path: the lock's file, made if it is not there; its folder must exist.
      refusal: what to say when another process holds it.

    Raises:
      UserError: another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(refusal) from None
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a lock as `lock` does, but wait for a process that holds it.

    Args:
      path: the lock's file, made if it is not there; its folder must exist.
      waiting: called once when another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary name that becomes `target` when the block ends without an error.

    An earlier file of that name is replaced. A block that finds its own file wrong removes it: the earlier
    one then stays.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_file(target: Path, overwrite: bool, suffix: str) -> None:
    """Raise UserError unless a file of that name may be written.

    Args:
      target: the file to make.
      overwrite: an earlier one may be replaced.
      suffix: how its name has to end.
    """
    target = target.absolute()
    remove_leftovers(target)
    if target.suffix != suffix:
        raise UserError(f"--out {target} must end in {suffix}")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder, expected a new file; choose another --out")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another --out, or replace it with --overwrite")


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends without an error.

    Args:
      target: the folder to make.
      overwrite: replace an earlier folder of the same kind.
      marker: the file that tells such a folder (manifest.json, config.json); a folder without it is
        never replaced.

    Yields:
      The temporary folder, beside the target.

    Raises:
      UserError: the target exists and may not be replaced.
    """
    target = target.absolute()
    check_replaceable(target, overwrite, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        old = temporary.with_name(f"{temporary.name}-old")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: Path, overwrite: bool, marker: str, inputs: Sequence[Path] = ()) -> None:
    """Raise UserError unless `target` is free, empty, or of the kind that `overwrite` may replace.

    Args:
      target: the folder to make.
      overwrite: an earlier one may be replaced.
      marker: the file that tells such a folder.
      inputs: what the command reads: nothing of it may lie in the target.
    """
    target = target.absolute()
    remove_leftovers(target)
    for path in inputs:
        if path.resolve().is_relative_to(target.resolve()):
            raise UserError(f"--out {target} is or holds {path}, which is read; choose another --out")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, expected a new folder; choose another --out")
    if not overwrite:
        raise UserError(f"{target} exists; choose another --out, or replace it with --overwrite")
    if not (target / marker).exists():
        raise UserError(f"{target} holds no {marker}, so it is not replaced; choose another --out")
    folders = sorted(path.name for path in target.iterdir() if path.is_dir())
    if folders:
        raise UserError(
            f"{target} holds folders of something else ({', '.join(folders)}), so it is not replaced; "
            "choose another --out"
        )


def as_path(value: object, what: str) -> Path:
    """Return a path that was given as one or as a text; UserError for anything else."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise UserError(f"{what} is {quoted(value)}, expected a path, such as Path('runs/mine')")


def check_writable(folder: Path) -> None:
    """Raise UserError unless a folder can be made, or written into where it is; nothing stays behind."""
    if re.match(r"\w[\w+.-]*:/", str(folder)):
        raise UserError(
            f"--out {str(folder).replace(':/', '://', 1)} is an address, expected a folder of this machine; "
            "write to one and copy it there, or mount that storage as a folder"
        )
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        if existing.is_symlink() and not existing.exists():
            raise UserError(f"--out {folder}: {existing} is a link to nowhere ({os.readlink(existing)})")
        if not existing.is_dir():
            raise UserError(f"--out {folder}: {existing} is a file, expected a folder; choose another --out")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {folder} can't be written ({reason}); choose another --out") from None


def _is_there(path: Path) -> bool:
    """Whether a path leads to something, be it a link to nowhere."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
        return True
    return False


def remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders for `target` whose process is gone.

    A replaced folder that has no successor, because the process died between two renames, comes back.
    """
    for leftover in sorted(target.parent.glob(f".{target.name}.tmp-*")):
        pid, _, old = leftover.name.rpartition(".tmp-")[2].partition("-")
        if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if old and not target.exists():  # killed between the two renames
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{os.getpid()}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
