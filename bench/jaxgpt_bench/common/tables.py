"""Tables: a column is said once, and each table is printed to a terminal, as Markdown or as HTML.

A column is a title and a function from a row to its text. `table` takes columns and rows; tables whose rows
are of several kinds are made of text at once, as `Table(titles, cells)`.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

import rich.table

from jaxgpt_bench.common.formatting import (
    ceiling_text,
    difference_text,
    power_text,
    rate_span,
    rate_text,
    share_text,
    shortened,
    span_text,
    time_span,
)
from jaxgpt_bench.common.rows import QualityRow, SpeedRow
from jaxgpt_bench.common.step_rows import KernelRow, KindRow, SourceRow, StepRow

Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


@dataclasses.dataclass(frozen=True)
class Column(Generic[Row_contra]):
    """A title, and what stands under it for a row."""

    title: str
    cell: Callable[[Row_contra], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Text in rows under titles."""

    titles: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]

    def terminal(self) -> rich.table.Table:
        """Return it for a terminal."""
        printed = rich.table.Table()
        for place, title in enumerate(self.titles):
            printed.add_column(title, no_wrap=place == 0, overflow="fold")  # a name that is cut names nothing
        for cells in self.cells:
            printed.add_row(*cells)
        return printed

    def markdown(self) -> str:
        """Return it as Markdown, in which a star is no emphasis."""
        rows = [[cell.replace("*", "\\*") for cell in cells] for cells in self.cells]
        lines = ["| " + " | ".join(cells) + " |" for cells in [list(self.titles), *rows]]
        return "\n".join([lines[0], "|" + "---|" * len(self.titles), *lines[1:]])

    def html(self, words: Collection[str] = (), quoted: int = 0) -> Any:
        """Return its rows as HTML, everything escaped; a template puts them into a <table>.

        Args:
          words: titles of the columns that hold words, which begin at the left.
          quoted: so many last rows are others' figures, of class "theirs".
        """
        from markupsafe import Markup, escape

        attributes = [Markup(' class="words"') if title in words else "" for title in self.titles]
        heads = Markup("").join(
            Markup("<th{}>{}</th>").format(*each) for each in zip(attributes, self.titles, strict=True)
        )
        lines = [Markup("<tr>{}</tr>").format(heads)]
        for number, cells in enumerate(self.cells):
            theirs = Markup(' class="theirs"') if number >= len(self.cells) - quoted else ""
            row = Markup("").join(
                Markup("<td{}>{}</td>").format(attribute, escape(cell))
                for attribute, cell in zip(attributes, cells, strict=True)
            )
            lines.append(Markup("<tr{}>{}</tr>").format(theirs, row))
        return Markup("\n").join(lines)


def table(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> Table:
    """Fill a table."""
    titles = tuple(column.title for column in columns)
    return Table(titles, tuple(tuple(column.cell(row) for column in columns) for row in rows))


def filled(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> tuple[Column[Row], ...]:
    """Return the columns in which some row has something: files of earlier versions lack figures."""
    return tuple(column for column in columns if any(column.cell(row) for row in rows))


def _compared(print_one: Callable[[QualityRow], str]) -> Callable[[QualityRow], str]:
    """Leave a cell empty for the model that others are compared with."""
    return lambda row: "" if row.is_reference else print_one(row)


MODEL = Column[QualityRow]("model", lambda row: row.name)
LOSS = Column[QualityRow]("validation loss", lambda row: f"{row.val_loss:.4f}")
DIFFERENCE = Column[QualityRow](
    "difference", _compared(lambda row: difference_text(row.loss_increase, row.difference_error))
)
KL_MEAN = Column[QualityRow]("KL mean", _compared(lambda row: power_text(row.kl_mean, row.kl_mean_error)))
KL_TAIL = Column[QualityRow]("KL 99.9 %", _compared(lambda row: power_text(row.kl_p999, row.kl_p999_error)))
KL_MAX = Column[QualityRow]("KL max", _compared(lambda row: f"{row.kl_max:.1e}"))
RMS_CHANGE = Column[QualityRow](
    "RMS Δp", _compared(lambda row: share_text(row.rms_probability_change, row.rms_probability_change_error))
)
TOP1 = Column[QualityRow]("top-1", _compared(lambda row: share_text(row.top1_agreement, row.top1_error)))
PARSES = Column[QualityRow]("parses", lambda row: "" if row.parse_share is None else f"{row.parse_share:.0%}")
SIZE = Column[QualityRow]("MB", lambda row: f"{row.size_mb:.2f}")
QUALITY = (MODEL, LOSS, DIFFERENCE, KL_MEAN, KL_TAIL, KL_MAX, RMS_CHANGE, TOP1, PARSES, SIZE)


def computed_by(rows: Iterable[QualityRow]) -> str:
    """Say which program computed which rows' logits; "" where the file does not tell."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.engine is not None:
            found.setdefault(row.engine, []).append(row.name)
    return "; ".join(f"{engine}: {', '.join(names)}" for engine, names in found.items())


ENGINE = Column[SpeedRow]("engine", lambda row: row.name)
SECONDS = Column[SpeedRow]("seconds, prompt included", lambda row: f"{row.seconds.median:.2f}")
TIME = Column[SpeedRow]("time, prompt included (min to max)", lambda row: time_span(row.seconds, "–"))
RATE = Column[SpeedRow](
    "tokens/s after the first (min-max)", lambda row: rate_span(row.decode_tokens_per_s, "-")
)
RATE_TO = Column[SpeedRow](
    "tokens/s after the first (min to max)", lambda row: rate_span(row.decode_tokens_per_s, "–")
)
CEILING = Column[SpeedRow]("of ceiling", ceiling_text)
CEILING_SHARE = Column[SpeedRow]("of ceiling", lambda row: f"{row.ceiling_share:.0%}")
CHARACTERS = Column[SpeedRow](
    "characters/s", lambda row: "" if row.characters_per_s is None else rate_text(row.characters_per_s.median)
)
PREFILL = Column[SpeedRow]("prefill/s", lambda row: rate_text(row.prefill_tokens_per_s.median))
SAME_TOKENS = Column[SpeedRow](
    "same greedy tokens",
    lambda row: "" if row.greedy_agrees is None else f"{row.greedy_agrees} of {len(row.greedy_tokens)}",
)
BUSY = Column[SpeedRow](
    "share kept beside busy processes",
    lambda row: "" if row.busy_share is None else f"{row.busy_share:.0%}",
)
FILE_SIZE = Column[SpeedRow]("file MB", lambda row: f"{row.file_mb:.1f}")
PEAK = Column[SpeedRow]("peak MB", lambda row: f"{row.peak_rss_mb:.0f}")
SPEED = (ENGINE, SECONDS, RATE, CEILING, FILE_SIZE, PEAK)
SPEED_TO = (TIME, RATE_TO, CEILING_SHARE, SAME_TOKENS)

TRAINER = Column[StepRow]("trainer", lambda row: row.name)
STEP_TIME = Column[StepRow](
    "ms/step", lambda row: f"{row.step_ms.median:.1f} ({row.step_ms.min:.1f}-{row.step_ms.max:.1f})"
)
STEP_CPU = Column[StepRow]("cpu-ms/step", lambda row: f"{row.step_cpu_ms.median:.1f}")
STEP_RATE = Column[StepRow]("tokens/s", lambda row: f"{row.tokens_per_s.median:,.0f}")
PRODUCT_SHARE = Column[StepRow]("of a product's rate", lambda row: f"{row.product_share:.0%}")
MFU = Column[StepRow]("MFU", lambda row: "unknown" if row.mfu is None else f"{row.mfu:.1%}")
STEP_MEMORY = Column[StepRow]("peak MB", lambda row: f"{row.device_mb or row.peak_rss_mb:.0f}")
AGAINST_FIRST = Column[StepRow](
    "time a token, of the first's",
    lambda row: "" if row.against_first is None else span_text(row.against_first),
)
STARTUP = Column[StepRow](
    "first step after (compiling)",
    lambda row: "" if row.startup_s is None else f"{row.startup_s:.0f} s ({row.compile_s or 0:.0f})",
)
FIRST_LOSSES = Column[StepRow](
    "loss at first, at last", lambda row: f"{row.losses[0]:.4f} {row.losses[-1]:.4f}"
)
STEPS = (TRAINER, STEP_TIME, STEP_CPU, STEP_RATE, PRODUCT_SHARE, MFU, STEP_MEMORY)
MORE_OF_STEPS = (TRAINER, AGAINST_FIRST, FIRST_LOSSES, STARTUP)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _rate(row: KindRow | KernelRow) -> str:
    if row.tflops is not None:
        return f"{row.tflops:.3g} TFLOP/s"
    return "" if row.gb_s is None else f"{row.gb_s:,.0f} GB/s"


KIND = Column[KindRow]("kind of kernel", lambda row: row.kind)
KIND_TIME = Column[KindRow]("ms/step", lambda row: f"{row.ms:.2f}")
KIND_SHARE = Column[KindRow]("of the step", lambda row: f"{row.share:.1%}")
KIND_COUNT = Column[KindRow]("kernels", lambda row: f"{row.kernels:.0f}" if row.kernels else "")
KIND_RATE = Column[KindRow]("reached", _rate)
OF_MEASURED = Column[KindRow]("of a plain product or copy", lambda row: _share(row.of_measured))
OF_DATASHEET = Column[KindRow]("of the datasheet", lambda row: _share(row.of_datasheet))
KINDS = (KIND, KIND_TIME, KIND_SHARE, KIND_COUNT, KIND_RATE, OF_MEASURED, OF_DATASHEET)
KERNELS = (
    Column[KernelRow]("kernel", lambda row: shortened(row.name)),
    Column[KernelRow]("kind", lambda row: row.kind),
    Column[KernelRow]("ms/step", lambda row: f"{row.ms:.2f}"),
    Column[KernelRow]("count", lambda row: f"{row.count:.0f}"),
    Column[KernelRow]("reached", lambda row: f"{_rate(row)} {_share(row.of_measured)}".strip()),
    Column[KernelRow]("source; HLO", lambda row: "; ".join(filter(None, (row.source, row.op)))),
)
SOURCES = (
    Column[SourceRow]("function", lambda row: row.source),
    Column[SourceRow]("ms/step", lambda row: f"{row.ms:.2f}"),
    Column[SourceRow]("of the step", lambda row: f"{row.share:.1%}"),
)
