"""What precision costs beside what it gives, every program's: a table of quality, a chart with speed.

Nats are those of `jaxgpt-bench quality --peers` on a small trained model, tokens a second those of
`jaxgpt-bench generate` at GPT-2's size, where weights are random and a loss says nothing. A program in a
precision has the same name in both and is converted the same way. Where a setting changes what it computes,
quality has a row for each, and the one that speed was measured with is taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt_bench.common.formatting import rate_text
from jaxgpt_bench.common.plots import Point, points_chart
from jaxgpt_bench.common.rows import QualityFigures, QualityRow, SpeedFigures, SpeedRow
from jaxgpt_bench.common.tables import DIFFERENCE, KL_MEAN, KL_TAIL, RMS_CHANGE, SIZE, TOP1, Column, table
from jaxgpt_bench.pages.headline import NAMES
from jaxgpt_bench.speed.programs import find_programs, own_engines

# Beginnings of precisions, in the order of the table.
BITS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "8 bits", "int4": "4 bits"}


def group(precision: str) -> str:
    """Return what fp32, int8-dynamic, ... have in common: float32, 8 bits, ..."""
    return BITS[precision.partition("-")[0]]


def programs(quality: QualityFigures) -> list[QualityRow]:
    """Return the rows of programs, named "engine precision"; those of modules are named precisions alone."""
    return [row for row in quality.rows if " " in row.name]


def points(quality: QualityFigures, speed: SpeedFigures) -> list[Point]:
    """Return a point for each program and precision that both files have set alike, this project's first."""
    costs = programs(quality)
    pairs = [
        (row, cost)
        for row in sorted(speed.rows, key=lambda row: row.engine not in own_engines())
        for cost in costs
        if _is_of(cost, row) and _is_set_alike(cost, row)
    ]
    return [
        Point(
            program=NAMES.get(row.engine, row.engine),
            group=group(row.precision),
            nats=cost.loss_increase,
            error=cost.difference_error,
            rate=row.decode_tokens_per_s.median,
        )
        for row, cost in pairs
    ]


def _is_of(cost: QualityRow, row: SpeedRow) -> bool:
    """Tell whether a row of quality is of a row of speed; those of several settings name theirs."""
    return cost.name.partition(", ")[0] == row.name


def _is_set_alike(cost: QualityRow, row: SpeedRow) -> bool:
    """Tell whether a program was set alike in both, but for what changes only its speed."""
    return all(row.settings.get(key, value) == value for key, value in _of_values(row, cost.settings or {}))


def _of_values(row: SpeedRow, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the settings that change what the row's program computes."""
    program = find_programs().get(row.engine)
    return list(settings.items()) if program is not None and program.changes_values else []


def picture(quality: QualityFigures, speed: SpeedFigures, cpu: str) -> str:
    """Return the chart as SVG; cpu is the processor's name."""
    settings = speed.settings
    title = (
        f"Across: nats added on a small trained model, {quality.val_tokens:,} held-out tokens, with 2 "
        "standard errors.\nUp: tokens/s at GPT-2's shape (124M, random weights), batch 1, "
        f"{settings.threads} threads of an {cpu}."
    )
    return points_chart(points(quality, speed), title)


def markdown_block(quality: QualityFigures, speed: SpeedFigures, cpu: str) -> str:
    """Return the programs as Markdown, those of one width together, the least added loss first.

    Args:
      quality: of a trained model.
      speed: of GPT-2's shape.
      cpu: the name of the processor that speed is of.
    """
    rates = {
        cost.name: row.decode_tokens_per_s.median
        for cost in programs(quality)
        for row in speed.rows
        if _is_of(cost, row) and _is_set_alike(cost, row)
    }
    order = list(BITS.values())
    rows = sorted(
        programs(quality),
        key=lambda row: (
            order.index(group(row.name.partition(", ")[0].partition(" ")[2])),
            row.loss_increase,
        ),
    )
    columns = (
        Column[QualityRow]("program", lambda row: row.name),
        *(DIFFERENCE, KL_MEAN, KL_TAIL, RMS_CHANGE, TOP1, SIZE),
        Column[QualityRow](
            "tokens/s, GPT-2's shape", lambda row: rate_text(rates[row.name]) if row.name in rates else ""
        ),
    )
    first = quality.rows[0]
    return (
        f"{quality.val_tokens:,} held-out tokens, {quality.windows}, against {quality.reference} (loss "
        f"{first.val_loss:.4f}); {quality.date}, commit {quality.commit}, {quality.machine.cpu}. "
        f"Tokens/s: {cpu}.{_set_otherwise(rows, speed)}\n\n{table(columns, rows).markdown()}"
    )


def _set_otherwise(rows: Sequence[QualityRow], speed: SpeedFigures) -> str:
    """Name the programs whose speed was measured with a setting that their quality was not."""
    measured = [
        row
        for row in speed.rows
        if any(_is_of(cost, row) for cost in rows)
        and not any(_is_of(cost, row) and _is_set_alike(cost, row) for cost in rows)
    ]
    found = [
        f"{row.name} ({', '.join(f'{key} {value}' for key, value in _of_values(row, row.settings))})"
        for row in measured
    ]
    said = "Not in the chart and without tokens/s, as their quality was measured with other settings"
    return f" {said}: {'; '.join(found)}." if found else ""
