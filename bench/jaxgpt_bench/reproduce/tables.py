"""The tables of a reproduction: cells of text, for the page and for the README alike."""

from collections.abc import Sequence
from typing import Any

from jaxgpt_bench.common.formatting import rate_text, signed
from jaxgpt_bench.speed.contestant_process import row_name

QUALITY_COLUMNS = ("model", "validation loss", "difference", "KL mean", "top-1", "samples that parse", "MB")
SPEED_COLUMNS = (
    "model", "engine", "time, prompt included (min to max)", "tokens/s after the first (min to max)",
    "of ceiling", "same greedy tokens",
)  # fmt: skip
ENGINE_COLUMNS = (*SPEED_COLUMNS[1:], "file MB", "peak MB")
CLAIM_COLUMNS = ("float32 to INT8", "the original's own figures", "here", "so here INT8")


def best_row(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of this project's fastest engine for a model; None where none was measured.

    Args:
      name: of the model: flax-fp32, torch-fp32, int8-dynamic, ...
      rows: of `jaxgpt-bench generate`.
    """
    precision = name.rpartition("-")[2] if name.endswith("-fp32") else name
    return fastest(
        row
        for row in rows
        if row["precision"] == precision
        and row["engine"].startswith("jaxgpt-")
        and (row["engine"] == "jaxgpt-flax") == (name == "flax-fp32")
    )


def fastest(rows: Any) -> dict[str, Any] | None:
    """Return the row with the shortest time from prompt to last token, of those with a KV cache."""
    cached = (row for row in rows if row["cached"])
    return min(cached, key=lambda row: row["seconds"]["median"], default=None)


def quality_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of quality: models, the held-out code itself, then the original's two."""
    samples = report["quality"]["parse_samples"]
    rows = []
    for row in report["models"]:
        share = row["parse_share"]
        parsing = "" if share is None else parse_text(round(share * samples), samples, row["parse_cut"])
        if row["kl_mean"] is None:  # the reference
            compared = ["", "", ""]
        else:
            compared = cost_cells({**row, "difference": row["loss_increase"], "top1": row["top1_agreement"]})
        rows.append([row["name"], f"{row['val_loss']:.4f}", *compared, parsing, f"{row['size_mb']:.2f}"])
        if row.get("parent"):  # trained on: what rounding costs it is seen against that training alone
            rows.append([f"… against {row['parent']['name']}", "", *cost_cells(row["parent"]), "", ""])
    held = report["quality"]["parse_held_out"]
    parsing = parse_text(held["parse"], held["texts"], held["cut"])
    rows.append(["held-out code itself", "", "", "", "", parsing, ""])
    theirs = report["original"]
    for at, name in enumerate(("the original's fp32", "the original's INT8")):
        loss, size = theirs["val_loss"][at], theirs["size_mb"][at]
        increase = f"{loss - theirs['val_loss'][0]:+.4f}" if at else ""
        rows.append([name, f"{loss:.4f}", increase, "", "", "", f"{size:.2f}"])
    return rows


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Format what a model loses against another: difference, its error, KL mean, top1."""
    return [
        difference_text(row["difference"], row["difference_error"]),
        f"{row['kl_mean']:.1e}",
        f"{row['top1']:.2%}",
    ]


def difference_text(difference: float, error: float | None) -> str:
    """Print a difference of losses with its standard error, and a star where it lies within twice that."""
    if error is None:
        return signed(difference)
    text = f"{error:.5f}"
    if float(text):
        star = " *" if is_within_error(difference, error) else ""
        return f"{signed(difference)} ± {text}{star}"
    return "0" if signed(difference) == "0" else f"{signed(difference)} ± less than 0.00001"


def is_within_error(difference: float, error: float | None) -> bool:
    """Tell whether a difference can't be told from none."""
    return error is not None and abs(difference) <= 2 * error


def parse_text(parse: int, texts: int, cut: int) -> str:
    """Say how many texts parse, and how many were cut."""
    return f"{parse} of {texts} ({cut} cut)"


def speed_text(row: dict[str, Any]) -> list[str]:
    """Format a speed row: time, rate, share of the ceiling, greedy tokens that are float32's."""
    time, rate = row["seconds"], row["decode_tokens_per_s"]
    scale, form, unit = (1e3, ",.0f", "ms") if time["median"] < 1 else (1, ",.2f", "s")
    median, low, high = (format(time[end] * scale, form) for end in ("median", "min", "max"))
    agrees = row["greedy_agrees"]
    return [
        f"{median} {unit} ({low}–{high})",
        f"{rate_text(rate['median'])} ({rate_text(rate['min'])}–{rate_text(rate['max'])})",
        f"{row['ceiling_share']:.0%}",
        "" if agrees is None else f"{agrees} of {len(row['greedy_tokens'])}",
    ]


def speed_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return each model's speed with this project's fastest engine for it."""
    found = [(row["name"], best_row(row["name"], report["speed"]["rows"])) for row in report["models"]]
    return [[name, row["engine"], *speed_text(row)] for name, row in found if row is not None]


def engine_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of all engines."""
    return [
        [row_name(row), *speed_text(row), f"{row['file_mb']:.1f}", f"{row['peak_rss_mb']:,.0f}"]
        for row in report["speed"]["rows"]
    ]


def other_text_cells(text: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a text from elsewhere: model, loss, difference, bits a byte."""
    return [
        [
            row["name"],
            f"{row['loss']:.4f}",
            "" if row is text["rows"][0] else difference_text(row["loss_increase"], row["difference_error"]),
            f"{row['bits_per_byte']:.4f}",
        ]
        for row in text["rows"]
    ]


def stage_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return when each stage's output was made, as far as that is known, and what was done this time."""
    rows = []
    for stage in report["stages"]:
        now = "kept" if stage["kept"] else f"{stage['seconds']:,.0f} s"
        rows.append([stage["stage"], made_text(stage.get("made")) or "not known", now])
    return rows


def made_text(made: dict[str, Any] | None) -> str:
    """Print date, commit and seconds of what is known; "" for nothing."""
    made = made or {}
    parts = [str(made["date"])[:10]] if made.get("date") else []
    parts += [f"commit {made['commit']}"] if made.get("commit") else []
    parts += [f"{made['seconds']:,.0f} s"] if made.get("seconds") is not None else []
    return ", ".join(parts)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay a table out in Markdown: its lines, the empty one before it first."""
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(cell.replace("*", "\\*") for cell in row) + " |" for row in rows)]
