"""`jaxgpt-bench report`: one self-contained page, report.json, and the README's table.

    jaxgpt-bench report --run RUN --fp32 ART --quality quality.json --speed speed.json ... --out FOLDER

Everything on the page comes from files that the other commands wrote; nothing is typed in.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json, write_atomic, write_json
from jaxgpt_bench.common.formatting import rate_text
from jaxgpt_bench.common.markdown_blocks import write_between_markers
from jaxgpt_bench.common.plots import loss_curve, speed_bars, speed_title
from jaxgpt_bench.common.provenance import commit
from jaxgpt_bench.quality.command import quality_cells
from jaxgpt_bench.speed.contestant_process import row_name

SHOWN_SAMPLES = 4
# The engines whose KV-cached speed stands for a quality row: the first that was measured.
SPEED_ROWS = {
    "flax-fp32": (("jaxgpt-flax", "fp32"),),
    "torch-fp32": (("jaxgpt-torch", "fp32"),),
    "int8-dynamic": (("jaxgpt-native", "int8-dynamic"), ("jaxgpt-torch", "int8-dynamic")),
    "int8-static": (("jaxgpt-native", "int8-static"), ("jaxgpt-torch", "int8-static")),
}
# The project that this one reimplements, as it published its own figures.
ORIGINAL = {"val_loss": (1.3223, 1.3350), "size_mb": (620.33, 148.88), "tokens_per_s": (2.95, 4.01)}


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Put the measured figures on one page.

    Attributes:
      run: run folder.
      fp32: float32 artifact, for its certificate.
      quality: JSON file of `jaxgpt-bench quality --out`.
      speed: JSON files of `jaxgpt-bench generate --out`; the first is the trained model's.
      out: folder for report.html and report.json.
      readme: README whose table is written anew; left alone if not given.
      json: print report.json on stdout.
    """

    run: Path
    fp32: Path
    quality: Path
    speed: tuple[Path, ...]
    out: Path
    readme: Path | None = None
    json: bool = False


def report(options: ReportOptions) -> Result:
    """Run `jaxgpt-bench report`."""
    from jaxgpt.training.run.folder import read_metrics  # imports JAX

    metrics = read_metrics(options.run)
    quality = read_json(options.quality, "quality figures")
    speeds = [read_json(path, "speed figures") for path in options.speed]
    if not speeds or not metrics:
        raise UserError(
            f"a report needs --speed figures and a run with metrics; {options.run} has {len(metrics)}"
        )
    train = read_json(options.run / "summary.json", "summary of a finished run")
    certificate = read_json(options.fp32 / "certificate.json", "certificate")
    with damaged(options.quality, "give what `jaxgpt-bench quality --out` wrote"):
        _ = quality["xz_bits_per_byte"], quality["rows"], quality["machine"], quality["samples"]
    figures = {
        "commit": commit(),
        "train": {**train, "xz_bits_per_byte": quality["xz_bits_per_byte"]},
        "parity": certificate["parity"],
        "models": [model_entry(row, speeds[0]) for row in quality["rows"]],
        "speed": [speed_entry(speed) for speed in speeds],
        "machine": quality["machine"],
        "date": quality["date"],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    page = render(figures, quality, speeds, metrics, certificate)
    write_atomic(options.out / "report.html", page)
    write_json(options.out / "report.json", figures)
    if options.readme is not None:
        write_between_markers(options.readme, "table", markdown_table(figures))
    say(f"wrote {options.out / 'report.html'} and {options.out / 'report.json'}")
    return Result(figures)


def speed_entry(speed: dict[str, Any]) -> dict[str, Any]:
    """Return what a report keeps of speed figures, which may be another machine's."""
    kept = {key: speed[key] for key in ("settings", "bandwidth_gb_s", "rows")}
    return {"cpu": speed["machine"]["cpu"], **kept}


def model_entry(row: dict[str, Any], speed: dict[str, Any]) -> dict[str, Any]:
    """Join a quality row with the speed of its engine (KV cache); None where that was not measured."""
    found = [
        line
        for engine in SPEED_ROWS.get(row["name"], ())
        for line in speed["rows"]
        if (line["engine"], line["precision"]) == engine and line["cached"]
    ]
    rate = found[0]["decode_tokens_per_s"]["median"] if found else None
    return {**row, "tokens_per_s": rate}


def render(
    figures: dict[str, Any],
    quality: dict[str, Any],
    speeds: Sequence[dict[str, Any]],
    metrics: Sequence[dict[str, Any]],
    certificate: dict[str, Any],
) -> str:
    """Fill the page's template."""
    folder = Path(__file__).parent
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    names = list(quality["samples"])
    every = max(len(quality["prompts"]) // SHOWN_SAMPLES, 1)
    samples = [
        {"prompt": prompt, "texts": _distinct([(name, quality["samples"][name][index]) for name in names])}
        for index, prompt in enumerate(quality["prompts"])
        if index % every == 0
    ]
    return environment.get_template("report.html.jinja").render(
        figures=figures,
        train=figures["train"],
        quality=quality,
        quality_rows=[quality_cells(row) for row in quality["rows"]],
        certificate=certificate,
        loss_svg=loss_curve(metrics),
        speeds=[(speed, speed_bars(speed["rows"], speed_title(speed))) for speed in speeds],
        samples=samples,
        original=ORIGINAL,
    )


def _distinct(texts: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Join the names of models that wrote the same text."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, text in texts:
        found.setdefault(text["text"], ([], text))[0].append(name)
    return [(", ".join(names), text) for names, text in found.values()]


def markdown_table(figures: dict[str, Any]) -> str:
    """Return the README's results table."""
    train, machine = figures["train"], figures["machine"]
    lines = [
        f"Preset {train['preset']}, {train['parameters']:,} parameters, {train['steps']} steps, "
        f"{train['tokens_seen']:,} tokens, {train['cpu_seconds']:.0f} cpu-seconds on {machine['cpu']} "
        f"({machine['cores']} cores): {train['val_bits_per_byte']:.3f} bits per byte on held-out files "
        f"(xz -9e on the same bytes: {train['xz_bits_per_byte']:.3f}).",
        "",
        "| model | validation loss | difference | KL mean | top-1 | MB | tokens/s after the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["models"]:
        name, loss, difference, kl, _, top1, _, size = quality_cells(row)
        rate = "" if row["tokens_per_s"] is None else rate_text(row["tokens_per_s"])
        lines.append(f"| {name} | {loss} | {difference} | {kl} | {top1} | {size} | {rate} |")
    for speed in figures["speed"][1:]:
        lines += ["", f"Speed on {speed['cpu']}, {speed_title(speed)}, batch 1, greedy:", ""]
        lines += ["| engine | seconds, prompt included | tokens/s after the first (min-max) | of ceiling "
                  "| file MB | peak MB |"]  # fmt: skip
        lines += ["|---|---|---|---|---|---|"]
        for row in speed["rows"]:
            decode = row["decode_tokens_per_s"]
            lines.append(
                f"| {row_name(row)} | {row['seconds']['median']:.2f} "
                f"| {rate_text(decode['median'])} ({rate_text(decode['min'])}-{rate_text(decode['max'])}) "
                f"| {row['ceiling_share']:.0%} | {row['file_mb']:.1f} | {row['peak_rss_mb']:.0f} |"
            )
    return "\n".join(lines)
