"""The one exception that users are meant to see."""

import contextlib
import dataclasses
import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 4000  # characters; what is longer quotes a damaged file
MOST_SHOWN = 20  # names of a list that are written out
LONGEST_QUOTE = 80


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a file, a folder.

    Its message is one line: what was wrong, what was got, what was expected, what to do. The command
    line prints it and exits with code 2. What a message quotes may hold line ends, or thousands of
    characters: they become spaces, and the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        line = " ".join(str(message).splitlines())
        if len(line) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            line = f"{line[:half]} [...] {line[-half:]}"
        super().__init__(line)


def quoted(value: object) -> str:
    """Return how a value of a damaged file is shown: its repr, where that is short and can be made."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists in lists; a number of 5000 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def brief(names: str, separator: str = ",") -> str:
    """Return a list of names for people: of more than 20 the first three, and how many follow."""
    parts = names.split(separator)
    if len(parts) <= MOST_SHOWN:
        return names
    return f"{separator.join(parts[:3])} and {len(parts) - 3} more"


def require_type(name: str, value: object, kind: type) -> None:
    """Raise UserError where an argument is something else."""
    if not isinstance(value, kind):
        raise UserError(f"{name} is {quoted(value)}, expected a {kind.__name__}")


@contextlib.contextmanager
def damaged(path: Path, remedy: str) -> Iterator[None]:
    """Say that a file is damaged when reading what it holds fails.

    Args:
      path: the file (JSON, say) whose values are used inside the block.
      remedy: what to do, such as "prepare it again".

    Raises:
      UserError: in place of what a missing key, a wrong type or an impossible value raises.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {line}); {remedy}") from None


def system_error_line(error: OSError) -> str:
    """Return in one line what the system says of a file, and what to do."""
    where = error.filename or "while writing"
    reason = " ".join((error.strerror or str(error)).split())
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}: {reason[:1].lower()}{reason[1:]}; free some space, or write elsewhere, and run again"
        )
    return f"{where}: {reason}; check the path and its permissions"


def require_local_paths(options: Any) -> None:
    """Raise UserError for a path that is an address, such as gs://bucket/run: pathlib sees folders in it.

    Args:
      options: a dataclass, and dataclasses inside it.
    """
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            require_local_paths(value)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                require_local_path(path, f"--{name.replace('_', '-')}")


def require_local_path(path: Path, option: str) -> None:
    """Raise UserError for a path that is an address."""
    if re.match(r"([A-Za-z][\w+.-]*):/", str(path)):
        address = str(path).replace(":/", "://", 1)
        raise UserError(
            f"{option} {address} is an address, expected a path of the local file system; copy it from or to "
            "there yourself, or mount it"
        )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Name the choices that look like a mistyped word.

    Args:
      word: what the user wrote.
      choices: what would have been valid.

    Returns:
      "did you mean tiny?" or, where nothing is near, "expected one of: a, b, c".
    """
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"expected one of: {', '.join(names)}"
