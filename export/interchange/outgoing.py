"""One file that appears whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import remove_leftovers


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
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary name that becomes `target` when the block ends without an error."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if temporary.exists():  # a block that finds its own file wrong removes it
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
