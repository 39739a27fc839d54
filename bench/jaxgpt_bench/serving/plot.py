"""The plot of `jaxgpt-bench serving`: tokens/s of all clients, and time to first token, by their number."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxgpt.shared.files import write_atomic
from jaxgpt_bench.common.plots import TEXT, svg, write_png
from jaxgpt_bench.serving.rows import LoadRow, ServingFigures

COLOURS = ("#1f7ae0", "#d9822b", "#2e9e6b", "#8c5fd0")


def serving_svg(figures: ServingFigures) -> str:
    """Draw a measurement."""
    return svg(_figure(figures))


def write_serving_plots(figures: ServingFigures, beside: Path) -> list[Path]:
    """Draw a measurement as .svg and .png beside its JSON file; return their paths."""
    picture, vectors = beside.with_suffix(".png"), beside.with_suffix(".svg")
    write_atomic(vectors, serving_svg(figures))
    write_png(_figure(figures), picture)
    return [vectors, picture]


def _figure(figures: ServingFigures) -> Figure:
    rows = [row for row in figures.load if not row.shared_tokens]
    figure, (rate, wait) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    colours = cycle(COLOURS)
    for server in dict.fromkeys(row.server for row in rows):
        colour = next(colours)
        for temperature, line in zip(
            dict.fromkeys(row.temperature for row in rows), ("-", "--"), strict=False
        ):
            mine = [row for row in rows if (row.server, row.temperature) == (server, temperature)]
            if not mine:
                continue
            label = server if temperature == 0 else f"{server}, temperature {temperature:g}"
            clients = [row.clients for row in mine]
            _spread(rate, mine, clients, colour, line, label)
            wait.plot(clients, [row.first_token_ms.median for row in mine], line, color=colour, marker="o")
    for axes, title in ((rate, "tokens/s, all clients together"), (wait, "first token, ms (median)")):
        axes.set_title(title, fontsize=9, color=TEXT, loc="left")
        axes.set_xlabel("clients", fontsize=9, color=TEXT)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row.clients for row in rows}), sorted({row.clients for row in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(TEXT)
        axes.tick_params(labelsize=9, colors=TEXT)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=TEXT)
    return figure


def _spread(
    axes: "plt.Axes", rows: Sequence[LoadRow], clients: Sequence[int], colour: str, line: str, label: str
) -> None:
    spreads = [row.tokens_per_s for row in rows]
    axes.plot(
        clients, [each.median for each in spreads], line, color=colour, marker="o", markersize=4, label=label
    )
    low, high = [each.min for each in spreads], [each.max for each in spreads]
    axes.fill_between(clients, low, high, color=colour, alpha=0.15, linewidth=0)
