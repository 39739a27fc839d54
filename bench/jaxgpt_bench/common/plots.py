"""The plots: the report's as SVG text, a measurement's as files too."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from jaxgpt.shared.files import new_file, write_atomic
from jaxgpt_bench.common.formatting import ceiling_text, counted, rate_text, signed
from jaxgpt_bench.common.rows import SpeedFigures, SpeedRow, SpeedSettings, Spread

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#b8bfc7"
SMOOTH_STEPS = 20
PNG_DPI = 150
WIDTH = 5.2  # inches of a page's chart: on a phone, 350 pixels wide, its text has 9 pixels
LINE_INCHES = 0.4  # of a bar with its name above
EDGE = 1.2  # of the fastest bar, where the axis ends
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

# Without a background: the colours of text have a contrast of 4 to white and to GitHub's dark page.
TEXT, STRONG, CALM = "#727b85", "#1f7ae0", "#8c959f"
CEILING_NOTE = "light bar: what memory allows, read bandwidth / bytes a token; in brackets the share reached"

# Of programs in a chart of points: each has a contrast of 3 to white and to GitHub's dark page.
COLOURS = (STRONG, "#c9702a", "#2e9e6b", "#8c5fd0", "#c2528b", "#8a7a1f", "#5f7f9c", "#b5483a", "#2a8fa3")
MARKERS = ("o", "s", "D", "^")
# Between -LINEAR_NATS and LINEAR_NATS an axis of nats is linear, outside of it logarithmic.
LINEAR_NATS = 1e-3

# Steps with values; read back from JSON, the pairs are lists.
Points = Sequence[Sequence[int | float]]


def svg(figure: Figure) -> str:
    """Return a figure as SVG that depends on nothing but what is drawn; closes it."""
    buffer = io.StringIO()
    # No date and a fixed salt: the same figures give the same bytes. No addresses of vocabularies either.
    with plt.rc_context({"svg.hashsalt": "jaxgpt", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=NO_METADATA)
    plt.close(figure)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def curve_points(metrics: Sequence[dict[str, Any]]) -> tuple[Points, Points]:
    """Return steps with training loss (a moving mean over 20 steps), and with validation loss.

    Args:
      metrics: rows of metrics.jsonl.
    """
    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
    losses = [loss for _, loss in train]
    means = [
        sum(losses[max(i - SMOOTH_STEPS + 1, 0) : i + 1]) / len(losses[max(i - SMOOTH_STEPS + 1, 0) : i + 1])
        for i in range(len(losses))
    ]
    return [(step, mean) for (step, _), mean in zip(train, means, strict=True)], val


def loss_curve(metrics: Sequence[dict[str, Any]]) -> str:
    """Draw training and validation loss against steps.

    Args:
      metrics: rows of metrics.jsonl.
    """
    return draw_curve(*curve_points(metrics))


def draw_curve(train: Points, val: Points) -> str:
    """Draw what `curve_points` gave."""
    figure, axes = _axes(WIDTH, 2.6)
    axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.4, label="training (mean of 20 steps)")
    axes.plot(
        *zip(*val, strict=True), color=ORANGE, marker="o", linewidth=1.4, label="validation, whole split"
    )
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel("loss, nats per token", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    return svg(figure)


def speed_bars(rows: Sequence[SpeedRow], title: str) -> str:
    """Draw tokens/s of each contestant (median, with min and max) in front of its ceiling.

    Args:
      rows: of `jaxgpt-bench generate`.
      title: what was measured.
    """
    return svg(_speed_figure(rows, title))


def write_speed_plots(figures: SpeedFigures, beside: Path) -> list[Path]:
    """Draw a whole measurement as .svg and .png beside its JSON file; return their paths."""
    title = speed_title(figures.settings)
    picture, vectors = beside.with_suffix(".png"), beside.with_suffix(".svg")
    write_atomic(vectors, speed_bars(figures.rows, title))
    write_png(_speed_figure(figures.rows, title), picture)
    return [vectors, picture]


def write_png(figure: Figure, picture: Path) -> None:
    """Write a figure as .png; closes it."""
    with new_file(picture) as path:
        figure.savefig(path, format="png", dpi=PNG_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def speed_title(settings: SpeedSettings) -> str:
    """Say what a speed file measured."""
    model = settings.model
    weights = f"{settings.preset}, random weights" if settings.preset else "the trained model"
    return (
        f"{weights}: {model['n_layer']} layers x {model['n_embd']}, {settings.tokens} tokens, "
        f"{counted(settings.threads, 'thread')}"
    )


def _speed_figure(rows: Sequence[SpeedRow], title: str) -> Figure:
    figure, axes = _axes(WIDTH, LINE_INCHES * len(rows) + 1.2)
    places = range(len(rows))
    ceilings = [row.shown_ceiling for row in rows]
    medians = [row.decode_tokens_per_s.median for row in rows]
    low = [row.decode_tokens_per_s.median - row.decode_tokens_per_s.min for row in rows]
    high = [row.decode_tokens_per_s.max - row.decode_tokens_per_s.median for row in rows]
    # A model in the cache has a ceiling far beyond its speed: such bars end, dotted, at the edge.
    edge = min(max(ceilings), EDGE * max(row.decode_tokens_per_s.max for row in rows)) * 1.02
    shown = [min(ceiling, edge) for ceiling in ceilings]
    ceiling_label = "ceiling: read bandwidth / bytes a token"
    axes.barh(places, shown, height=0.45, color=GREY, alpha=0.45, label=ceiling_label)
    axes.barh(places, medians, height=0.3, color=BLUE, xerr=[low, high], ecolor="#444", label="measured")
    axes.set_xlim(0, edge * 1.04)
    texts = []
    for place, row in enumerate(rows):
        if row.shown_ceiling > edge:
            axes.plot([edge, edge * 1.04], [place, place], linestyle=":", color="#444")
        texts.append(f"{rate_text(medians[place])}  ({ceiling_text(row, span=False)})")
    _bar_axes(axes, [row.name for row in rows], texts, title)
    axes.set_xlabel("tokens/s after the first", fontsize=9)
    below = offset_copy(axes.transAxes, figure, y=-0.4)
    axes.legend(
        frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below
    )
    return figure


def _bar_axes(axes: Axes, names: Sequence[str], texts: Sequence[str], title: str) -> None:
    """Name bars that lie on each other, the first on top: name and figures stand above each bar."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.6, -0.85)
    for place, (name, text) in enumerate(zip(names, texts, strict=True)):
        for x, words, side in ((0, name, "left"), (1, text, "right")):
            axes.text(
                x,
                place - 0.3,
                words,
                ha=side,
                va="bottom",
                fontsize=8.5,
                transform=axes.get_yaxis_transform(),
            )
    axes.set_title(title, fontsize=10, loc="left", wrap=True)


def loss_bars(rows: Sequence[tuple[str, float, float | None]], title: str) -> str:
    """Draw what models' losses differ by, with whiskers of twice the standard error.

    Args:
      rows: name, nats, and their standard error where it is known.
      title: what is drawn.
    """
    figure, axes = _axes(WIDTH, LINE_INCHES * len(rows) + 0.8)
    places = range(len(rows))
    values = [value for _, value, _ in rows]
    errors = [2 * (error or 0.0) for _, _, error in rows]
    axes.barh(places, values, height=0.35, color=BLUE, xerr=errors, ecolor="#444")
    low = min(0.0, *(value - error for value, error in zip(values, errors, strict=True)))
    high = max(0.0, *(value + error for value, error in zip(values, errors, strict=True)))
    span = (high - low) or 1.0
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set_xlim(low - 0.03 * span, high + 0.03 * span)
    _bar_axes(axes, [name for name, _, _ in rows], [signed(value) for value in values], title)
    axes.set_xlabel("nats per token", fontsize=9)
    return svg(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A program's rate in front of its ceiling.

    Attributes:
      label: stands beside it.
      rate: tokens a second.
      ceiling: tokens a second that the memory allows.
      share: of the ceiling that was reached.
      highlighted: drawn in the strong colour.
    """

    label: str
    rate: Spread
    ceiling: float
    share: float
    highlighted: bool


def program_bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> str:
    """Draw programs under headings, as wide as GitHub's column, on no background; return SVG.

    Args:
      groups: a heading and its bars, in the order in which they are drawn.
      title: what was measured.
    """
    return svg(program_figure(groups, title))


def program_figure(groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> Figure:
    """Draw what `program_bars` returns."""
    lines = sum(len(bars) + 1 for _, bars in groups)
    figure, axes = plt.subplots(figsize=(8.6, 0.22 * lines + 0.75))
    edge = max(bar.ceiling for _, bars in groups for bar in bars)
    place = 0
    for heading, bars in groups:
        _at_left(axes, place, heading, weight="bold")
        for bar in bars:
            place += 1
            _program_bar(axes, place, bar, edge)
        place += 1
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(0, edge)
    axes.axis("off")
    axes.set_title(title, fontsize=10, color=TEXT, loc="left")
    axes.text(0, place, CEILING_NOTE, fontsize=8.5, color=TEXT, va="center")
    return figure


def _program_bar(axes: Axes, place: int, bar: Bar, edge: float) -> None:
    colour = STRONG if bar.highlighted else CALM
    weight = "bold" if bar.highlighted else "normal"
    _at_left(axes, place, bar.label, weight, STRONG if bar.highlighted else TEXT)
    axes.barh(place, bar.ceiling, height=0.78, color=CALM, alpha=0.28)
    axes.barh(place, bar.rate.median, height=0.78, color=colour)
    text = f"{rate_text(bar.rate.median)}  ({bar.share:.0%})"
    axes.text(edge * 1.015, place, text, va="center", fontsize=9, weight=weight, color=TEXT)


def _at_left(axes: Axes, place: int, text: str, weight: str, colour: str = TEXT) -> None:
    beside = offset_copy(axes.transData, axes.get_figure(root=True), x=-0.08)
    axes.text(
        0, place, text, ha="right", va="center", fontsize=9, weight=weight, color=colour, transform=beside
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A program in one precision.

    Attributes:
      program: gives the colour, in the order of first appearance; the first one is this project.
      group: gives the marker, in the same order.
      nats: that it adds to the loss.
      error: standard error of that; None where it is not known.
      rate: tokens a second.
    """

    program: str
    group: str
    nats: float
    error: float | None
    rate: float


def points_chart(points: Sequence[Point], title: str) -> str:
    """Draw tokens a second against nats added, with whiskers of twice the standard error; return SVG.

    Args:
      points: one a program and precision.
      title: what was measured.
    """
    return svg(points_figure(points, title))


def points_figure(points: Sequence[Point], title: str) -> Figure:
    """Draw what `points_chart` returns."""
    figure, axes = plt.subplots(figsize=(8.6, 4.2))
    programs = list(dict.fromkeys(point.program for point in points))
    groups = list(dict.fromkeys(point.group for point in points))
    for point in points:
        colour = COLOURS[programs.index(point.program) % len(COLOURS)]
        axes.errorbar(
            point.nats,
            point.rate,
            xerr=2 * (point.error or 0.0),
            marker=MARKERS[groups.index(point.group) % len(MARKERS)],
            markersize=8 if point.program == programs[0] else 6.5,
            color=colour,
            elinewidth=1,
        )
    axes.set_xscale("symlog", linthresh=LINEAR_NATS)
    axes.xaxis.set_major_formatter(lambda nats, place: f"{nats:g}")
    axes.set_ylim(bottom=0)
    axes.axvline(0, color=CALM, linewidth=0.8, zorder=0)
    axes.grid(color=CALM, alpha=0.25)
    axes.set_title(title, fontsize=10, color=TEXT, loc="left")
    axes.set_xlabel("nats a token added to the loss (left is better)", fontsize=9, color=TEXT)
    axes.set_ylabel("tokens/s (up is better)", fontsize=9, color=TEXT)
    axes.tick_params(labelsize=9, colors=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    keys = [
        *(Line2D([], [], linestyle="", marker=marker, color=TEXT, label=group)
          for marker, group in zip(MARKERS, groups, strict=False)),
        *(Line2D([], [], linestyle="", marker="o", color=colour, label=program)
          for colour, program in zip(COLOURS, programs, strict=False)),
    ]  # fmt: skip
    axes.legend(
        handles=keys, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, labelcolor=TEXT
    )
    return figure
