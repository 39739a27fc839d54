"""Where a command writes, checked and made ready before it works for minutes; files.py writes."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_writable


def prepare_output_file(target: Path | None, option: str = "--out") -> None:
    """Make the folder of a file that a command writes at its end, and replaces; nothing for None.

    Raises:
      UserError: it can't be written.
    """
    if target is None:
        return
    check_writable(target, option)
    if target.is_dir():
        raise UserError(f"{option} {target} is a folder, expected a file; choose another {option}")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)


def prepare_output_folder(target: Path, option: str = "--out") -> None:
    """Make a folder that a command writes files into, before any work; one that is there stays.

    Raises:
      UserError: it can't be made, or nothing can be written into it.
    """
    target = target.absolute()
    if not os.path.exists(target):
        check_writable(target, option)
    elif not os.path.isdir(target):
        raise UserError(f"{option} {target} is a file, expected a folder; choose another {option}")
    target.mkdir(parents=True, exist_ok=True)
    check_writable(target / "written", option)


def require_local_paths(options: Any) -> None:
    """Raise UserError for a path that is an address, such as gs://bucket/run: pathlib sees folders in it.

    Args:
      options: a dataclass, and dataclasses inside it.
    """
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            require_local_paths(value)
        for path in value if isinstance(value, tuple) else (value,):
            found = re.match(r"([A-Za-z][\w+.-]*):/", str(path)) if isinstance(path, Path) else None
            if found:
                address = str(path).replace(":/", "://", 1)
                raise UserError(
                    f"--{name.replace('_', '-')} {address} is an address, expected a path of the local file "
                    "system; copy it from or to there yourself, or mount it"
                )
