"""The page of a reproduction, its report.json and the README's tables: nothing on them is typed in.

The page is a function of report.json alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_atomic, write_json
from jaxgpt_bench.common.plots import curve_points, draw_curve, loss_bars, speed_bars, speed_title
from jaxgpt_bench.report.command import ORIGINAL
from jaxgpt_bench.reproduce import claims, tables
from jaxgpt_bench.reproduce.recipes import HUB_SOURCE, Recipe

TEMPLATES = Path(__file__).resolve().parent.parent
CURVE_POINTS = 200
QUALITY = (
    "reference", "val_tokens", "val_bytes", "windows", "parse_held_out", "xz_bits_per_byte", "date", "commit",
    "machine",
)  # fmt: skip
SPEED = ("settings", "rounds", "bandwidth_gb_s", "left_out", "rows", "machine", "date", "commit")
SAMPLE = ("prompt", "temperature", "model", "text", "finish_reason")
FASTEST = ("engine", "seconds", "decode_tokens_per_s", "ceiling_share", "greedy_agrees")


def report_figures(
    recipe: Recipe,
    dataset: Dataset,
    run: Path,
    fp32: Path,
    measured: dict[str, Any],
    log: Sequence[dict[str, Any]],
    asked: dict[str, Any],
) -> dict[str, Any]:
    """Gather what report.json holds.

    Args:
      recipe: the preset.
      dataset: that the run was trained on.
      run: the run folder.
      fp32: its float32 artifact.
      measured: figures of the stages quality, samples, other_text, memorization and speed.
      log: of the stages.
      asked: preset, what it is, and the command.
    """
    from jaxgpt.training.run.folder import read_metrics  # imports JAX

    quality, speed, memorization = measured["quality"], measured["speed"], measured["memorization"]
    certificate = read_json(fp32 / "certificate.json", "certificate")
    train, val = curve_points(read_metrics(run))
    every = max(len(train) // CURVE_POINTS, 1)
    manifest = dataset.manifest
    summary = read_json(run / "summary.json", "summary of a finished run")
    return {
        **asked,
        "data": {
            **{key: manifest[key] for key in ("source", "revision", "tokenizer", "counts")},
            "is_the_original_s": is_the_original_s(str(manifest["source"])),
            "manifest_sha256": dataset.sha256,
        },
        "train": {**summary, "xz_bits_per_byte": quality["xz_bits_per_byte"], "step_taken":
                  certificate["origin"]["step"], "curve": {"train": train[::every], "val": val}},
        "parity": certificate["parity"],
        "files": {name: certificate["files"][name] for name in ("model.safetensors",)},
        "quality": {**{key: quality[key] for key in QUALITY}, "parse_samples": len(quality["prompts"]),
                    "parse_tokens": recipe.parse_tokens},
        "models": [{**row, "fastest": fastest_figures(row["name"], speed["rows"])}
                   for row in quality["rows"]],
        "original": ORIGINAL,
        "speed": {key: speed[key] for key in SPEED},
        "samples": sample_entries(measured["samples"], memorization),
        "sampling": {key: measured["samples"][key] for key in ("seed", "longest")},
        "other_text": [
            {**{key: text[key] for key in text if key != "made_from"}, "sha256": text["made_from"]["file"]}
            for text in measured["other_text"]
        ],
        "memorization": {key: memorization[key] for key in ("overlap", "train_tokens", "summary")},
        "stages": list(log),
    }  # fmt: skip


def is_the_original_s(source: str) -> bool:
    """Tell whether a data set's source is what the original was trained on."""
    return source == "hub" or source.partition("@")[0] == HUB_SOURCE


def fastest_figures(name: str, speeds: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the figures of this project's fastest engine for a model; None where none was measured."""
    row = tables.best_row(name, speeds)
    return None if row is None else {key: row[key] for key in FASTEST}


def sample_entries(samples: dict[str, Any], memorization: dict[str, Any]) -> list[dict[str, Any]]:
    """Join each sample with its longest run from the training text."""
    return [
        {
            **{key: row[key] for key in SAMPLE},
            "tokens": len(row["tokens"]),
            "verbatim": {"tokens": run["tokens"], "text": run["text"]},
        }
        for row, run in zip(samples["samples"], memorization["runs"], strict=True)
    ]


def render(report: dict[str, Any]) -> str:
    """Fill the page's template with a report.json.

    Raises:
      UserError: it lacks something.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    try:
        speed, curve = report["speed"], report["train"]["curve"]
        return environment.get_template("reproduce.html.jinja").render(
            figures=report,
            train=report["train"],
            speed=speed,
            words=claims,
            tables=tables,
            loss_svg=draw_curve(curve["train"], curve["val"]),
            bars_svg=loss_bars(cost_bars(report), "What quantization adds to the validation loss"),
            speed_svg=speed_bars(speed["rows"], speed_title(speed)),
            prompts=by_prompt(report["samples"]),
        )
    except (LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise UserError(f"report.json does not fit this version ({error}); run reproduce again") from None


def cost_bars(report: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Return each quantized model's name, loss above its float32 parent, and the error of that."""
    bars = []
    for row in report["models"]:
        parent = row.get("parent")
        if parent:
            name = f"{row['name']} above {parent['name']}"
            bars.append((name, parent["difference"], parent["difference_error"]))
        elif row["name"].startswith("int"):
            bars.append((row["name"], row["loss_increase"], row["difference_error"]))
    return bars


def by_prompt(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group samples by prompt, in their order; models that wrote the same text share a row, `models`.

    Returns:
      For each prompt its `sampled` rows and its `greedy` ones.
    """
    found: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for row in samples:
        rows = found.setdefault(row["prompt"], {})
        same = rows.get((row["temperature"], row["text"]))
        if same is None:
            rows[row["temperature"], row["text"]] = {**row, "models": row["model"]}
        else:
            same["models"] += f" and {row['model']} alike"
    return [
        {
            "prompt": prompt,
            "sampled": [row for row in rows.values() if row["temperature"] > 0],
            "greedy": [row for row in rows.values() if row["temperature"] == 0],
        }
        for prompt, rows in found.items()
    ]


def write_page(folder: Path, report: dict[str, Any]) -> None:
    """Write report.html and report.json."""
    page = render(report)
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", page)


def markdown_table(report: dict[str, Any]) -> str:
    """Return the README's tables, and what was measured in words."""
    train, speed, quality = report["train"], report["speed"], report["quality"]
    tokens, count = speed["settings"]["tokens"], claims.counted(speed["settings"]["threads"], "thread")
    lines = [
        f"Preset {report['preset']}: {train['parameters']:,} parameters, {train['tokens_seen']:,} tokens of "
        f"{claims.what_it_was_trained_on(report)}. {' '.join(claims.conclusion(report))}",
        "",
        f"The original is {claims.THE_ORIGINAL}. Tokens/s are {tokens} tokens / the whole "
        "time, prompt included:",
        *tables.markdown(tables.CLAIM_COLUMNS, claims.claims(report)),
        "",
        f"Quality of the Flax model and the PyTorch modules on {quality['val_tokens']:,} held-out tokens "
        f"({quality['windows']}), against {quality['reference']}; ± is one standard error, * a difference "
        "within two of them. The last two rows are the original's own figures, of another model on "
        "another text:",
        *tables.markdown(tables.QUALITY_COLUMNS, tables.quality_cells(report)),
        "",
        f"Speed for {tokens} tokens on {speed['machine']['cpu']} ({count}), the fastest of this project's "
        "engines for each model:",
        *tables.markdown(tables.SPEED_COLUMNS, tables.speed_cells(report)),
        "",
        f"- Times and rates are each the median of {claims.counted(speed['rounds'], 'round')}, with minimum "
        "and maximum.",
        *(f"- Text from elsewhere: {claims.other_text_verdict(text)}." for text in report["other_text"]),
        f"- Learned by heart: {claims.memorized(report)} {claims.overlap(report)}",
    ]
    return "\n".join(lines)
