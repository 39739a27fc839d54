"""The tables of a reproduction, for the page and for docs/ alike."""

from jaxgpt_bench.common.formatting import difference_text
from jaxgpt_bench.common.rows import ParseCount
from jaxgpt_bench.common.tables import (
    ENGINE,
    FILE_SIZE,
    KL_MEAN,
    LOSS,
    MODEL,
    PEAK,
    SIZE,
    SPEED_TO,
    TOP1,
    Column,
    Table,
    table,
)  # fmt: skip
from jaxgpt_bench.reproduce.figures import (
    Made,
    OtherTextFigures,
    OtherTextRow,
    ReproducedModel,
    Reproduction,
    StageEntry,
)
from jaxgpt_bench.reproduce.page.claims import best_row

CLAIM_COLUMNS = ("float32 to INT8", "the earlier project's own figures", "here", "so here INT8")
EARLIER_ROWS = ("the earlier project's fp32", "the earlier project's INT8")


def quality_table(report: Reproduction) -> Table:
    """Return quality: models, some held against their parent, held-out code itself, the earlier project."""
    samples = report.quality.parse_samples

    def difference(row: ReproducedModel) -> str:
        if row.is_reference:
            return ""
        return difference_text(row.loss_increase, row.difference_error, star=True)

    def parsing(row: ReproducedModel) -> str:
        if row.parse_share is None:
            return ""
        parse = round(row.parse_share * samples)
        return parse_text(ParseCount(texts=samples, parse=parse, cut=row.parse_cut))

    columns = (
        MODEL,
        LOSS,
        Column[ReproducedModel]("difference", difference),
        KL_MEAN,
        TOP1,
        Column[ReproducedModel]("samples that parse", parsing),
        SIZE,
    )
    models = table(columns, report.models)
    rows: list[tuple[str, ...]] = []
    for row, cells in zip(report.models, models.cells, strict=True):
        rows.append(cells)
        if row.parent is not None:  # trained on: what rounding costs is seen against that training alone
            parent = row.parent
            cost = difference_text(parent.difference, parent.difference_error, star=True)
            rows.append(
                (f"… against {parent.name}", "", cost, f"{parent.kl_mean:.1e}", f"{parent.top1:.2%}", "", "")
            )
    held_out = parse_text(report.quality.parse_held_out)
    rows.append(("held-out code itself", "", "", "", "", held_out, ""))
    losses = report.original.val_loss
    for name, loss, size in zip(EARLIER_ROWS, losses, report.original.size_mb, strict=True):
        increase = f"{loss - losses[0]:+.4f}" if loss != losses[0] else ""
        rows.append((name, f"{loss:.4f}", increase, "", "", "", f"{size:.2f}"))
    return Table(models.titles, tuple(rows))


def parse_text(count: ParseCount) -> str:
    """Say how many texts parse, and how many were cut."""
    return f"{count.parse} of {count.texts} ({count.cut} cut)"


def speed_table(report: Reproduction) -> Table:
    """Return each model's speed with this project's fastest program for it."""
    best = [(model.name, best_row(model.name, report.speed.rows)) for model in report.models]
    measured = [(name, row) for name, row in best if row is not None]
    found = table(SPEED_TO, [row for _, row in measured])
    return Table(
        ("model", "engine", *found.titles),
        tuple((name, row.engine, *cells) for (name, row), cells in zip(measured, found.cells, strict=True)),
    )


def engine_table(report: Reproduction) -> Table:
    """Return every program that was measured."""
    return table((ENGINE, *SPEED_TO, FILE_SIZE, PEAK), report.speed.rows)


def other_text_table(text: OtherTextFigures) -> Table:
    """Return the models' losses on a text from elsewhere."""
    columns = (
        Column[OtherTextRow]("model", lambda row: row.name),
        Column[OtherTextRow]("nats per token", lambda row: f"{row.loss:.4f}"),
        Column[OtherTextRow](
            "difference",
            lambda row: (
                ""
                if row is text.rows[0]
                else difference_text(row.loss_increase, row.difference_error, star=True)
            ),
        ),
        Column[OtherTextRow]("bits per byte", lambda row: f"{row.bits_per_byte:.4f}"),
    )
    return table(columns, text.rows)


STAGES = (
    Column[StageEntry]("stage", lambda entry: entry.stage),
    Column[StageEntry]("made", lambda entry: made_text(entry.made) or "not known"),
    Column[StageEntry]("this time", lambda entry: "kept" if entry.kept else f"{entry.seconds:,.0f} s"),
)


def stage_table(report: Reproduction) -> Table:
    """Return when each stage's output was made, as far as that is known, and what was done this time."""
    return table(STAGES, report.stages)


def made_text(made: Made) -> str:
    """Print date, commit and seconds of what is known; "" for nothing."""
    parts = [made.date[:10]] if made.date else []
    parts += [f"commit {made.commit}"] if made.commit else []
    parts += [f"{made.seconds:,.0f} s"] if made.seconds is not None else []
    return ", ".join(parts)
