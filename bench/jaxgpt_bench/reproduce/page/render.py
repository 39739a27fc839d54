"""The page of a reproduction, its report.json and its blocks in docs/: nothing on them is typed in.

Each is a function of report.json alone.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError, brief
from jaxgpt.shared.files import read_json, write_atomic, write_json
from jaxgpt_bench.common.formatting import counted, rate_text, signed, verdict_sentence, without_folders
from jaxgpt_bench.common.plots import curve_points, draw_curve, loss_bars, speed_bars, speed_title
from jaxgpt_bench.common.rows import SpeedRow
from jaxgpt_bench.report.page import EARLIER
from jaxgpt_bench.reproduce.figures import Reproduction, Sample, StageEntry
from jaxgpt_bench.reproduce.page import tables
from jaxgpt_bench.reproduce.page.claims import best_row, claims, int8_cost, other_loss, parse_bound, text_kind
from jaxgpt_bench.reproduce.recipes import HUB_SOURCE, Recipe

TEMPLATES = Path(__file__).resolve().parents[2]
CURVE_POINTS = 200
SHOWN_CHARACTERS = 500  # of a sample in docs/samples.md
QUALITY = (
    "reference", "val_tokens", "val_bytes", "windows", "parse_held_out", "xz_bits_per_byte", "date", "commit",
    "machine",
)  # fmt: skip
SPEED = ("settings", "rounds", "bandwidth_gb_s", "left_out", "rows", "machine", "date", "commit")
SPEED_OPTIONAL = ("noise",)  # which what was measured earlier lacks
SAMPLE = ("prompt", "temperature", "model", "text", "finish_reason")
FASTEST = ("engine", "seconds", "decode_tokens_per_s", "ceiling_share", "greedy_agrees")


def report_figures(
    recipe: Recipe,
    dataset: Dataset,
    run: Path,
    fp32: Path,
    measured: dict[str, Any],
    log: Sequence[StageEntry],
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
    from jaxgpt.training.run.folder import read_metrics, read_run_config  # imports JAX
    from jaxgpt.training.run.summary import read_summary

    quality, speed, memorization = measured["quality"], measured["speed"], measured["memorization"]
    certificate = read_json(fp32 / "certificate.json", "certificate")
    train, val = curve_points(read_metrics(run))
    every = max(len(train) // CURVE_POINTS, 1)
    manifest = dataset.manifest
    speeds = [SpeedRow.from_json(row) for row in speed["rows"]]
    summary = read_summary(run)
    return {
        **asked,
        "data": {
            **{key: manifest[key] for key in ("revision", "tokenizer", "counts")},
            **({"reading": manifest["reading"]} if "reading" in manifest else {}),
            "source": without_folders(str(manifest["source"])),
            "is_the_original_s": is_earlier_data(str(manifest["source"])),
            "manifest_sha256": dataset.sha256,
        },
        "train": {**summary, "xz_bits_per_byte": quality["xz_bits_per_byte"], "step_taken":
                  certificate["origin"]["step"], "curve": {"train": train[::every], "val": val},
                  "settings": dataclasses.asdict(read_run_config(run).train)},
        "parity": certificate["parity"],
        "files": {name: certificate["files"][name] for name in ("model.safetensors",)},
        "quality": {**{key: quality[key] for key in QUALITY}, "parse_samples": len(quality["prompts"]),
                    "parse_tokens": recipe.parse_tokens},
        "models": [{**row, "fastest": fastest_figures(row["name"], speeds)}
                   for row in quality["rows"]],
        "original": EARLIER.to_json(),
        "speed": {key: speed[key] for key in (*SPEED, *SPEED_OPTIONAL) if key in speed or key in SPEED},
        "samples": sample_entries(measured["samples"], memorization),
        "sampling": {key: measured["samples"][key] for key in ("seed", "longest")},
        "other_text": [
            {**{key: text[key] for key in text if key != "made_from"}, "sha256": text["made_from"]["file"]}
            for text in measured["other_text"]
        ],
        "memorization": {key: memorization[key] for key in ("overlap", "train_tokens", "summary")},
        "stages": [entry.to_json() for entry in log],
    }  # fmt: skip


def is_earlier_data(source: str) -> bool:
    """Tell whether a data set's source is what the earlier project was trained on."""
    return source == "hub" or source.partition("@")[0] == HUB_SOURCE


def fastest_figures(name: str, speeds: Sequence[SpeedRow]) -> dict[str, Any] | None:
    """Return the figures of this project's fastest program for a model; None where none was measured."""
    row = best_row(name, speeds)
    return None if row is None else {key: row.to_json()[key] for key in FASTEST}


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


def read_report(report: Mapping[str, Any]) -> Reproduction:
    """Read a report.json.

    Raises:
      UserError: it lacks something.
    """
    try:
        return Reproduction.from_json(report)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"report.json does not fit this version ({error}); run reproduce again") from None


def templates(escape: bool) -> jinja2.Environment:
    """Return the templates with what they compute.

    Args:
      escape: what is put into HTML; Markdown takes it as it is.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined)
    for function in (
        brief,
        claims,
        int8_cost,
        other_loss,
        parse_bound,
        text_kind,
        counted,
        rate_text,
        signed,
    ):
        environment.globals[function.__name__] = function
    environment.globals |= {
        "tables": tables, "verdict_sentence": verdict_sentence, "without_folders": without_folders,
    }  # fmt: skip
    return environment


def render(report: Mapping[str, Any]) -> str:
    """Fill the page's template with a report.json.

    Raises:
      UserError: it lacks something.
    """
    found = read_report(report)
    speed, curve = found.speed, found.train["curve"]
    try:
        return (
            templates(escape=True)
            .get_template("reproduce/page/page.html.jinja")
            .render(
                report=found,
                figures=found,
                train=found.train,
                speed=speed,
                commands=commands(found),
                loss_svg=draw_curve(curve["train"], curve["val"]),
                bars_svg=loss_bars(cost_bars(found), "What quantization adds to the validation loss"),
                speed_svg=speed_bars(speed.rows, speed_title(speed.settings)),
                prompts=by_prompt(found.samples),
            )
        )
    except (LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise UserError(f"report.json does not fit this version ({error}); run reproduce again") from None


def markdown_block(report: Mapping[str, Any]) -> str:
    """Return the tables of docs/reproduction.md, and what was measured in words."""
    return (
        templates(escape=False)
        .get_template("reproduce/page/readme.md.jinja")
        .render(report=read_report(report))
    )


def samples_block(report: Mapping[str, Any]) -> str:
    """Return the samples of docs/samples.md."""
    found = read_report(report)
    environment = templates(escape=False)
    for function in (beginning, greedy_alike, parse_counts):
        environment.globals[function.__name__] = function
    template = environment.get_template("reproduce/page/samples.md.jinja")
    return template.render(report=found, prompts=by_prompt(found.samples)).strip()


def beginning(text: str) -> str:
    """Cut a sample where the page ends it; lines end without spaces."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} [...]"
    return "\n".join(line.rstrip() for line in shown.rstrip().split("\n"))


def greedy_alike(samples: Sequence[Sample]) -> dict[str, int]:
    """Count prompts, greedy texts, those cut at the limit, and prompts after which all texts are alike."""
    greedy = [row for row in samples if row.temperature == 0]
    prompts = {row.prompt for row in greedy}
    alike = [prompt for prompt in prompts if len({row.text for row in greedy if row.prompt == prompt}) == 1]
    return {
        "prompts": len(prompts),
        "greedy": len(greedy),
        "cut": sum(row.finish_reason == "length" for row in greedy),
        "alike": len(alike),
    }


def parse_counts(report: Reproduction) -> dict[str, int]:
    """Return how many samples of each model parse, where that was counted."""
    samples = report.quality.parse_samples
    return {
        row.name: round(row.parse_share * samples) for row in report.models if row.parse_share is not None
    }


def commands(report: Reproduction) -> list[str]:
    """Return the lines that run it again, from the project's folder; the text from elsewhere is optional."""
    cuda = "cuda," if report.preset == "gpu" else ""
    words = shlex.split(report.command)
    others = [at for at, word in enumerate(words) if word == "--other-text"]
    left_out = {*others, *(at + 1 for at in others)}
    lines = [
        "python3 -m venv .venv && source .venv/bin/activate",
        f"pip install -c constraints.txt -e '.[train,{cuda}export,bench,peers]'",
        shlex.join(word for at, word in enumerate(words) if at not in left_out),
    ]
    for text in report.other_text:
        given = f"{text.file}={text.about}" if text.about else text.file
        lines += [
            "",
            "# optional, the loss on text from elsewhere: a table with a column text, here the one of sha256",
            f"# {text.sha256}",
            f"#   {shlex.join(['--other-text', given])}",
        ]
    return lines


def cost_bars(report: Reproduction) -> list[tuple[str, float, float | None]]:
    """Return each quantized model's name, loss above its float32 parent, and the error of that."""
    bars = []
    for row in report.models:
        if row.parent is not None:
            name = f"{row.name} above {row.parent.name}"
            bars.append((name, row.parent.difference, row.parent.difference_error))
        elif row.name.startswith("int"):
            bars.append((row.name, row.loss_increase, row.difference_error))
    return bars


def by_prompt(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Group samples by prompt, in their order; models that wrote the same text share a row, `models`.

    Returns:
      For each prompt its `sampled` rows and its `greedy` ones.
    """
    found: dict[str, dict[tuple[float, str], dict[str, Any]]] = {}
    for row in samples:
        rows = found.setdefault(row.prompt, {})
        same = rows.get((row.temperature, row.text))
        if same is None:
            rows[row.temperature, row.text] = {**vars(row), "models": row.model}
        else:
            same["models"] += f" and {row.model} alike"
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
