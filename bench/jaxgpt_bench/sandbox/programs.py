"""What of a generated text is a program: its code and its functions."""

import ast
import dataclasses
import warnings
from collections.abc import Callable

FENCE = "```"
MOST_REPEATS = 5  # of a run of tokens or words, before a text is said to repeat itself


@dataclasses.dataclass(frozen=True)
class Program:
    """The code of a generated text.

    Attributes:
      code: between the first fence and the next; all up to the first fence where none opens the code, or
        where code stands before it and no function behind.
      functions: names that it defines, in order; None where it is no Python.
    """

    code: str
    functions: tuple[str, ...] | None

    def function_that(self, fits: Callable[[str], bool]) -> str | None:
        """Return the first name that fits, or None."""
        return next((name for name in self.functions or () if fits(name)), None)


def program_of(text: str) -> Program:
    """Return the program of a text that goes on after a request."""
    head, fence, rest = text.partition(FENCE)
    language, newline, body = rest.partition("\n")
    opens = fence and newline and language.strip().lower() in ("", "python", "py", "python3")
    fenced = body.partition(FENCE)[0]
    # A word or a call before the fence is Python too; a program without a function may end at the fence.
    takes_body = opens and not _functions(head) and (not parses(head) or _functions(fenced))
    code = fenced if takes_body else head
    return Program(code, _functions(code))


def parses(code: str) -> bool:
    """Whether a text is Python that does something: non-empty and accepted by ast.parse."""
    return _functions(code) is not None


def _functions(code: str) -> tuple[str, ...] | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\\d" in a string, and the like
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not tree.body:
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def edit_similarity(a: str, b: str) -> float:
    """Return 1 - d / max(len(a), len(b)), d the least number of changed, added and removed characters.

    Source: Levenshtein 1966; 1 for two empty texts.
    """
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return 1 - row[-1] / max(len(a), len(b))
