"""Files and folders that appear whole or not at all; JSON and hashes.

What is written gets a temporary name beside its target, `.NAME.tmp-PID`, and is renamed at the end: a reader
sees the old content or the new one, never a part. What a killed process leaves behind is removed by the next
command that writes to the same target.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, quoted, require_local_path
from jaxgpt.shared.locks import is_locked, lock
from jaxgpt.shared.machine import is_alive

# What data sets, artifacts and models for ONNX Runtime consist of; other files there are the user's.
WRITTEN = (
    "manifest.json", "train*.bin", "val*.bin", "config.json", "generation_config.json", "certificate.json",
    "model.safetensors", "probe.safetensors", "qat.safetensors", "model.onnx", "model.onnx.data", "README.md",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
TRIES, PAUSE_S = 20, 0.02  # to make a folder below one that other processes make and remove


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

    Raises:
      OSError: it can't be written; of a full device with the path and the bytes that it takes.
    """
    temporary = _temporary(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with (
            _naming_what_is_full(path, lambda: f", it takes {len(data):,} bytes"),
            temporary.open("wb") as file,
        ):
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


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-lock")


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Keep other processes from making the same folder until the block or the process ends.

    Args:
      target: the folder; the lock lies beside it.

    Raises:
      UserError: another process makes it, or it can't be written.
    """
    target = target.absolute()
    check_writable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_of(target)
    with lock(path, f"another process writes {target}; wait for it, or choose another --out"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary name that becomes `target` when the block ends without an error.

    An earlier file of that name is replaced. A block that finds its own file wrong removes it: the earlier
    one then stays.

    Raises:
      OSError: the device is full; with the path and the bytes that were written.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        with _naming_what_is_full(target, lambda: f" after {_size_of(temporary):,} bytes of it"):
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
    check_writable(target)
    if target.suffix != suffix:
        raise UserError(f"--out {target} must end in {suffix}")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder, expected a new file; choose another --out")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another --out, or replace it with --overwrite")


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends without error and has not removed it.

    Args:
      target: the folder to make.
      overwrite: replace an earlier folder of the same kind.
      marker: the file that tells such a folder (manifest.json, config.json); a folder without it is
        never replaced.

    Yields:
      The temporary folder, beside the target.

    Raises:
      UserError: the target exists and may not be replaced.
      OSError: the device is full; with the path and the bytes that were written.
    """
    target = target.absolute()
    check_replaceable(target, overwrite, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        with _naming_what_is_full(target, lambda: f" after {_size_of(temporary):,} bytes of it"):
            temporary.mkdir()
            yield temporary
        if not temporary.exists():
            return
        old = temporary.with_name(f"{temporary.name}-old")
        if target.exists():
            _sync(temporary)  # on the disk before the old one goes
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Force a folder's files to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def check_replaceable(target: Path, overwrite: bool, marker: str, inputs: Sequence[Path] = ()) -> None:
    """Raise UserError unless `target` can be written and is free, empty, or of the kind to be replaced.

    Args:
      target: the folder to make.
      overwrite: an earlier one may be replaced.
      marker: the file that tells such a folder.
      inputs: what the command reads: nothing of it may lie in the target.
    """
    target = target.absolute()
    check_writable(target)
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(target)):
            raise UserError(f"--out {target} is or holds {path}, which is read; choose another --out")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, expected a new folder; choose another --out")
    if not overwrite:
        raise UserError(f"{target} exists; choose another --out, or replace it with --overwrite")
    if not (target / marker).exists():
        raise UserError(f"{target} holds no {marker}, so it is not replaced; choose another --out")
    for what, found in (
        ("folders", [path.name for path in target.iterdir() if path.is_dir()]),
        ("files", [path.name for path in target.iterdir() if not any(map(path.match, (marker, *WRITTEN)))]),
    ):
        if found:
            names = ", ".join(sorted(found))
            raise UserError(
                f"{target} holds {what} of something else ({names}), so it is not replaced; "
                "choose another --out"
            )


def check_writable(target: Path, option: str = "--out") -> None:
    """Raise UserError unless a file or folder of that name can be made; what is missing above it is no fault.

    Before any work: nothing is left behind.

    Args:
      target: the file or folder to make or to replace.
      option: that gives it, for messages.
    """
    target = target.absolute()
    other = f"choose another {option}"
    if os.path.islink(target):
        where = os.readlink(target)
        raise UserError(
            f"{option} {target} is a symbolic link, which would be replaced; give {where}, or {other}"
        )
    if os.path.ismount(target):
        raise UserError(
            f"{option} {target} is a mount point, which can't be replaced; give a folder inside it"
        )
    error = _refusal(target)
    for _ in range(TRIES):
        if not isinstance(error, FileNotFoundError):
            break
        time.sleep(PAUSE_S)
        error = _refusal(target)
    if error is not None:
        raise UserError(f"{option} {target} can't be written: {error.strerror} ({error.filename}); {other}")


def _refusal(target: Path) -> OSError | None:
    """Return what the system says where a folder is made, and removed again with what was missing above it.

    FileNotFoundError too where another process, doing the same, removes a folder above that was there before.
    """
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    made: list[Path] = []
    try:
        remove_leftovers(target)
        for folder in [*reversed(missing), _temporary(target)]:
            folder.mkdir()
            made.append(folder)
    except FileExistsError:  # another process makes the same folder
        pass
    except OSError as error:
        return error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty: another process writes there
                folder.rmdir()
    return None


def prepare_output_file(target: Path | None, option: str = "--out") -> None:
    """Make the folder of a file that a command writes, whole each time, and replaces; nothing for None.

    Raises:
      UserError: it can't be written.
    """
    if target is None:
        return
    check_writable(target, option)
    if target.is_dir():
        raise UserError(f"{option} {target} is a folder, expected a file; choose another {option}")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)


def check_output_folder(target: Path, option: str = "--out") -> None:
    """Raise UserError unless a folder can be made, or written into where it is; a link to one is one.

    Args:
      target: the folder, which a command fills file by file (a run's, a report's).
      option: that gives it, for messages.
    """
    require_local_path(target, option)
    try:
        _check_output_folder(target.absolute(), option)
    except ValueError as error:  # a path with a NUL
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option} {target} can't be written: {error}; choose another {option}") from None


def _check_output_folder(target: Path, option: str) -> None:
    there = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if there.is_symlink() and not there.exists():
        raise UserError(f"{option} {target}: {there} is a link to nowhere ({os.readlink(there)})")
    if not there.is_dir() and there.exists():  # else another process has removed it, which had made it
        raise UserError(
            f"{option} {target} can't be written: {there} is a file, expected a folder; "
            f"choose another {option}"
        )
    check_writable(target / "written" if target == there else target, option)


@contextlib.contextmanager
def _naming_what_is_full(target: Path, how: Callable[[], str]) -> Iterator[None]:
    """Say of a full device what was not written.

    Args:
      target: the file or folder.
      how: what more to say of it, asked for when it happens.
    """
    try:
        yield
    except Exception as error:  # libraries put what the system says into classes of their own
        if not _is_full(error, target.parent):
            raise
        text = f"No space left on the device{how()}"
        raise OSError(errno.ENOSPC, text, str(target)) from error


def _is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or "No space left" in str(error):
            return True
        if isinstance(error, OSError) and error.errno is None:  # numpy's, of an array that was cut
            return shutil.disk_usage(folder).free == 0
        error = error.__cause__ or error.__context__
    return False


def _size_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files; 0 where there is none."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def as_path(value: object, what: str) -> Path:
    """Return a path that was given as one or as a text; UserError for anything else."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise UserError(f"{what} is {quoted(value)}, expected a path, such as Path('runs/mine')")


def remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders for `target` whose process is gone.

    A replaced folder that has no successor, because the process died between two renames, comes back. Nothing
    is removed while somebody holds the target's lock: in another container its process has a number that is
    nobody's here, or ours.
    """
    if is_locked(_lock_of(target)):
        return
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.tmp-*")):
        pid, _, old = leftover.name.rpartition(".tmp-")[2].partition("-")
        if not pid.isdigit() or (int(pid) != os.getpid() and is_alive(int(pid))):
            continue
        if old and not target.exists():  # killed between the two renames
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{os.getpid()}")
