"""What reading a source left out: counted by reason, the first of each named; nothing is dropped silently."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxgpt.shared.errors import UserError

EXAMPLES = 3


class ReadReport:
    """Counts what is left out while a source is read.

    Args:
      skip_errors: leave out what is damaged instead of stopping there.

    Attributes:
      skipped: how many were left out, by reason (a plural: "rows without text").
      examples: where the first of them stand, by reason.
      python_bytes: of the Python files of which docstring pairs were taken.
      pair_bytes: of those pairs.
      notes: other lines that the user should see.
    """

    def __init__(self, skip_errors: bool = False) -> None:
        self.skip_errors = skip_errors
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.python_bytes = 0
        self.pair_bytes = 0
        self.notes: list[str] = []

    def skip(self, reason: str, where: object) -> None:
        """Count something that is left out; str(where) tells where it stands."""
        self.skipped[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES and str(where) not in named:
            named.append(str(where))

    def add(self, other: "ReadReport") -> None:
        """Take over what another reading counted."""
        for reason, count in other.skipped.items():
            self.skipped[reason] += count
            self.examples[reason] = [*self.examples.get(reason, []), *other.examples[reason]][:EXAMPLES]
        self.notes += other.notes
        self.add_pairs(other.python_bytes, other.pair_bytes)

    def add_pairs(self, file_bytes: int, pair_bytes: int) -> None:
        """Count a Python file of which docstring pairs were taken."""
        self.python_bytes += file_bytes
        self.pair_bytes += pair_bytes

    def damaged(self, message: str, reason: str, where: object) -> None:
        """Leave out what can't be read.

        Raises:
          UserError: without --skip-errors; it says the message, and that option.
        """
        if not self.skip_errors:
            raise UserError(f"{message}, or leave it out with --skip-errors")
        self.skip(reason, where)

    def to_json(self) -> dict[str, Any]:
        """Return what was counted, as JSON takes it."""
        return {name: value for name, value in vars(self).items() if name != "skip_errors"}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ReadReport":
        """Return a report of what another process counted."""
        report = cls()
        vars(report).update(found)
        report.skipped = Counter(found["skipped"])
        report.examples = {reason: list(places) for reason, places in found["examples"].items()}
        report.notes = list(found["notes"])
        return report

    def lines(self) -> list[str]:
        """Return what is told of the reading, a line for each thing."""
        lines = list(self.notes)
        if self.skipped:
            lines.append(f"left out: {self.summary()}")
        if self.python_bytes:
            lines.append(
                f"of {self.python_bytes / 1000:,.1f} KB of Python, {self.pair_bytes / 1000:,.1f} KB are "
                "taken, as docstring pairs; --code files takes whole files"
            )
        return lines

    def figures(self) -> dict[str, Any]:
        """Return the same as data, for --json; empty where all was taken."""
        figures: dict[str, Any] = {}
        if self.skipped:
            figures["left_out"] = {
                reason: {"count": count, "first": self.examples[reason]}
                for reason, count in self.skipped.items()
            }
        if self.python_bytes:
            figures["python"] = {"bytes": self.python_bytes, "taken_as_pairs": self.pair_bytes}
        return figures

    def summary(self) -> str:
        """Return what was left out: counts, reasons and the first places."""
        parts = []
        for reason, count in self.skipped.items():
            named = self.examples[reason]
            parts.append(f"{count:,} {reason} ({', '.join(named)}{', ...' if count > len(named) else ''})")
        return "; ".join(parts)
