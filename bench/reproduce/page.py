"""The page of a reproduction, its report.json and the README's table: nothing on them is typed in.

The page is a function of report.json alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench.engines import row_name
from bench.plots import curve_points, draw_curve, loss_bars, speed_bars, speed_title
from bench.report import ORIGINAL
from bench.reproduce.recipes import HUB_SOURCE, Recipe
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_atomic, write_json
from jaxgpt.tokens import Dataset

TEMPLATES = Path(__file__).resolve().parent.parent
CURVE_POINTS = 200
INT8 = "int8-dynamic"  # what the original measured
ORIGINAL_SETTING = "a GPT-2 trained from scratch on flytech/python-codes-25k with several T4 GPUs"
ORIGINAL_ENGINE = (
    "transformers",
    "fp32",
    False,
    True,
)  # engine, precision, KV cache, the logits of every position
COLUMNS = (
    "model", "validation loss", "difference", "KL mean", "top-1", "parses", "MB", "engine", "seconds",
    "tokens/s", "of ceiling",
)  # fmt: skip


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
    from jaxgpt.runs import read_metrics  # imports JAX

    quality, speed = measured["quality"], measured["speed"]
    certificate = read_json(fp32 / "certificate.json", "certificate")
    train, val = curve_points(read_metrics(run))
    every = max(len(train) // CURVE_POINTS, 1)
    manifest = dataset.manifest
    names = ("reference", "val_tokens", "val_bytes", "xz_bits_per_byte", "date", "commit")
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
        "quality": {**{name: quality[name] for name in names}, "parse_samples": len(quality["prompts"]),
                    "parse_tokens": recipe.parse_tokens, "machine": quality["machine"]},
        "models": [model_entry(row, speed["rows"]) for row in quality["rows"]],
        "original": ORIGINAL,
        "speed": [{**{key: speed[key] for key in
                      ("settings", "rounds", "bandwidth_gb_s", "rows", "machine", "date", "commit")},
                   "command": f"{asked['command']} --redo speed"}],
        "samples": sample_entries(measured["samples"], measured["memorization"]),
        "sampling": {key: measured["samples"][key] for key in ("seed", "longest")},
        "other_text": [{key: value for key, value in text.items() if key != "made_from"}
                       for text in measured["other_text"]],
        "memorization": {key: measured["memorization"][key]
                         for key in ("overlap", "train_tokens", "summary")},
        "stages": list(log),
    }  # fmt: skip


def is_the_original_s(source: str) -> bool:
    """Tell whether a data set's source is what the original was trained on."""
    return source == "hub" or source.partition("@")[0] == HUB_SOURCE


def best_row(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest row of this project's engines for a model; None where none was measured.

    Args:
      name: of the model: flax-fp32, torch-fp32, int8-dynamic, ...
      rows: of `jaxgpt-bench generate`.
    """
    precision = name.rpartition("-")[2] if name.endswith("-fp32") else name
    found = [
        row
        for row in rows
        if row["precision"] == precision
        and row["engine"].startswith("jaxgpt-")
        and (row["engine"] == "jaxgpt-flax") == (name == "flax-fp32")
        and row.get("cached", True)
    ]
    return max(found, key=lambda row: row["decode_tokens_per_s"]["median"], default=None)


def model_entry(row: dict[str, Any], speeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join a quality row with its fastest engine."""
    best = best_row(row["name"], speeds)
    return {
        **row,
        "engine": None if best is None else best["engine"],
        "seconds": None if best is None else best["seconds"]["median"],
        "tokens_per_s": None if best is None else best["decode_tokens_per_s"]["median"],
        "ceiling_share": None if best is None else best["ceiling_share"],
    }


def sample_entries(samples: dict[str, Any], memorization: dict[str, Any]) -> list[dict[str, Any]]:
    """Join each sample with its longest run from the training text."""
    return [
        {
            **{key: row[key] for key in ("prompt", "temperature", "model", "text", "finish_reason")},
            "tokens": len(row["tokens"]),
            "verbatim": {"tokens": run["tokens"], "text": run["text"]},
        }
        for row, run in zip(samples["samples"], memorization["runs"], strict=True)
    ]


def claims(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return what the original claimed, its figures, and those of this run: one row a claim."""
    models = {row["name"]: row for row in report["models"]}
    before, after = models["torch-fp32"], models[INT8]
    theirs = report["original"]
    loss, size, rate = theirs["val_loss"], theirs["size_mb"], theirs["tokens_per_s"]
    increase = after["val_loss"] - before["val_loss"]
    shrinks, gains = before["size_mb"] / after["size_mb"], None
    rows = [
        {
            "claim": "validation loss, nats",
            "original": f"{loss[0]:.4f} to {loss[1]:.4f} ({loss[1] - loss[0]:+.4f})",
            "here": f"{before['val_loss']:.4f} to {after['val_loss']:.4f} ({increase:+.5f})",
            "so": "costs less" if increase < loss[1] - loss[0] else "costs as much or more",
        },
        {
            "claim": "size, MB",
            "original": f"{size[0]:.2f} to {size[1]:.2f} ({size[0] / size[1]:.2f} times smaller)",
            "here": f"{before['size_mb']:.2f} to {after['size_mb']:.2f} ({shrinks:.2f} times smaller)",
            "so": "shrinks the file more" if shrinks > size[0] / size[1] else "shrinks the file less",
        },
    ]
    here, so = "not measured", ""
    if before["tokens_per_s"] and after["tokens_per_s"]:
        gains = after["tokens_per_s"] / before["tokens_per_s"]
        here = f"{before['tokens_per_s']:,.1f} to {after['tokens_per_s']:,.1f} ({gains:.2f} times)"
        so = "gains more" if gains > rate[1] / rate[0] else "gains less" if gains > 1 else "is slower"
    rows.append(
        {
            "claim": f"tokens/s, {report['speed'][0]['settings']['tokens']} tokens",
            "original": f"{rate[0]:.2f} to {rate[1]:.2f} ({rate[1] / rate[0]:.2f} times), 250 tokens",
            "here": here,
            "so": so,
        }
    )
    uncached = original_s_way(report)
    if uncached is not None and after["tokens_per_s"]:
        slow = uncached["decode_tokens_per_s"]["median"]
        gains = after["tokens_per_s"] / slow
        rows.append(
            {
                "claim": "the same, float32 being run the way the original ran it",
                "original": "as above",
                "here": f"{slow:,.1f} to {after['tokens_per_s']:,.1f} ({gains:.2f} times)",
                "so": "gains more"
                if gains > rate[1] / rate[0]
                else "gains less"
                if gains > 1
                else "is slower",
            }
        )
    return rows


def original_s_way(report: dict[str, Any]) -> dict[str, Any] | None:
    """Return the speed of this model run as the original ran its own."""
    keys = ("engine", "precision", "cached", "every_logit")
    rows = report["speed"][0]["rows"]
    return next((row for row in rows if tuple(row.get(key) for key in keys) == ORIGINAL_ENGINE), None)


def table_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table: every model, then the original's two."""
    samples = report["quality"]["parse_samples"]
    rows = []
    for row in report["models"]:
        first = row["kl_mean"] is None
        share = row["parse_share"]
        rows.append(
            [
                row["name"],
                f"{row['val_loss']:.4f}",
                "" if first else f"{row['loss_increase']:+.5f}",
                "" if first else f"{row['kl_mean']:.1e}",
                "" if first else f"{row['top1_agreement']:.2%}",
                "" if share is None else f"{round(share * samples)} of {samples}",
                f"{row['size_mb']:.2f}",
                row["engine"] or "",
                "" if row["seconds"] is None else f"{row['seconds']:.2f}",
                "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.1f}",
                "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}",
            ]
        )
    theirs = report["original"]
    for at, name in enumerate(("the original's fp32", "the original's INT8")):
        loss = theirs["val_loss"][at]
        increase = f"{loss - theirs['val_loss'][0]:+.4f}" if at else ""
        size, rate = theirs["size_mb"][at], theirs["tokens_per_s"][at]
        rows.append(
            [name, f"{loss:.4f}", increase, "", "", "", f"{size:.2f}", "its own", "", f"{rate:.2f}", ""]
        )
    return rows


def engine_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of all engines."""
    rows = []
    for row in report["speed"][0]["rows"]:
        decode = row["decode_tokens_per_s"]
        rows.append(
            [
                engine_name(row),
                f"{row['seconds']['median']:.2f}",
                f"{decode['median']:,.1f}",
                f"{decode['min']:,.0f}-{decode['max']:,.0f}",
                f"{row['ceiling_share']:.0%}",
                f"{row['file_mb']:.1f}",
                f"{row['peak_rss_mb']:,.0f}",
            ]
        )
    return rows


def engine_name(row: dict[str, Any]) -> str:
    """Name a row of the speed table."""
    return row_name({"cached": True, "every_logit": False, **row})


def threads(count: int) -> str:
    """Say how many threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


def what_it_was_trained_on(report: dict[str, Any]) -> str:
    """Say what text it was, and whether it is the original's."""
    data = report["data"]
    if data["is_the_original_s"]:
        return "flytech/python-codes-25k, the original's data set, deduplicated and split anew"
    source = str(data["source"])
    if source == "stdlib":
        text = "functions of the Python standard library with their docstrings"
    elif source.startswith("packages:"):
        count = len(source.removeprefix("packages:").split(","))
        text = f"functions of {count} installed Python packages with their docstrings"
    else:
        text = f"text of the user's own ({Path(source).name})"
    return f"{text}: not the original's data set"


def limits(report: dict[str, Any]) -> list[str]:
    """Return where a run falls short, from its figures."""
    train, data, speed = report["train"], report["data"], report["speed"][0]
    samples = report["quality"]["parse_samples"]
    found = []
    if not data["is_the_original_s"]:
        found.append(
            f"It was trained on {what_it_was_trained_on(report)}. Losses of the two can't be compared; what "
            "quantization adds to them can."
        )
    found += [
        f"The model has {train['parameters'] / 1e6:.1f} million parameters and saw "
        f"{train['tokens_seen'] / 1e6:.1f} million tokens; the original's file of 620 MB is that of a GPT-2 "
        "of 124 million and more. Sizes and speeds are therefore compared as ratios.",
        f"The share of samples that parse rests on {samples} texts a model: one text more or less is "
        f"{1 / samples:.0%}, and differences below about {2 * (0.25 / samples) ** 0.5:.0%} mean nothing.",
        "The checkpoint was chosen by its loss on the whole validation split, of which the quality figures "
        f"are measured on the first {report['quality']['val_tokens']:,} tokens; windows do not overlap, so "
        "first tokens have little context.",
        "int8-static-qat was trained on for further steps: its difference in loss is not the cost of "
        "rounding.",
        f"Speed was measured on one machine ({speed['machine']['cpu']}, {speed['machine']['cores']} cores, "
        f"possibly shared), batch 1, {speed['rounds']} rounds; ratios travel better than times. A small "
        "model fits the caches, which favours float32.",
        "The samples are chosen by a seed, not by taste, and the prompts given as they stand: a model that "
        "was trained on docstrings may go on with the sentence before it begins the code. The text of a "
        "small model looks like Python; it does not solve tasks.",
    ]
    return found


def render(report: dict[str, Any]) -> str:
    """Fill the page's template with a report.json.

    Raises:
      UserError: it lacks something.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    try:
        speed = report["speed"][0]
        theirs = report["original"]["val_loss"]
        bars = [(row["name"], row["loss_increase"], False) for row in report["models"][1:]]
        bars.append(("the original's INT8", theirs[1] - theirs[0], True))
        rows = [{"cached": True, "every_logit": False, **row} for row in speed["rows"]]
        return environment.get_template("reproduce.html.jinja").render(
            figures=report,
            train=report["train"],
            claims=claims(report),
            columns=COLUMNS,
            table=table_cells(report),
            engines=engine_cells(report),
            threads=threads(speed["settings"]["threads"]),
            trained_on=what_it_was_trained_on(report),
            original_setting=ORIGINAL_SETTING,
            limits=limits(report),
            loss_svg=draw_curve(report["train"]["curve"]["train"], report["train"]["curve"]["val"]),
            bars_svg=loss_bars(bars, f"Validation loss above {report['quality']['reference']}"),
            speeds=[(speed, speed_bars(rows, speed_title(speed)))],
            prompts=by_prompt(report["samples"]),
        )
    except (LookupError, TypeError, jinja2.UndefinedError) as error:
        raise UserError(f"report.json does not fit this version ({error}); run reproduce again") from None


def by_prompt(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group samples by prompt, in their order; models that wrote the same text share a row, `models`."""
    found: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for row in samples:
        rows = found.setdefault(row["prompt"], {})
        same = rows.get((row["temperature"], row["text"]))
        if same is None:
            rows[row["temperature"], row["text"]] = {**row, "models": row["model"]}
        else:
            same["models"] += f" and {row['model']} alike"
    return [{"prompt": prompt, "rows": list(rows.values())} for prompt, rows in found.items()]


def write_page(folder: Path, report: dict[str, Any]) -> None:
    """Write report.html and report.json."""
    page = render(report)
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", page)


def markdown_table(report: dict[str, Any]) -> str:
    """Return the README's table."""
    train, machine = report["train"], report["speed"][0]["machine"]
    settings = report["speed"][0]["settings"]
    lines = [
        f"Preset {report['preset']}: {train['parameters']:,} parameters, {train['tokens_seen']:,} tokens of "
        f"{what_it_was_trained_on(report)}. Quality on {report['quality']['val_tokens']:,} held-out tokens; "
        f"speed for {settings['tokens']} tokens on {machine['cpu']} ({threads(settings['threads'])}), the "
        "fastest engine of each row. The last two rows are the original project's own figures, for its "
        "model, its data and its machine.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in table_cells(report))])
