"""The page of `jaxgpt-bench report`, its report.json and the table of docs/results.md."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxgpt_bench.common.formatting import is_within_error, rate_text, verdict_sentence, without_folders
from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData
from jaxgpt_bench.common.plots import loss_curve, speed_bars, speed_title
from jaxgpt_bench.common.provenance import commit
from jaxgpt_bench.common.rows import (
    EarlierFigures,
    Machine,
    Noise,
    QualityFigures,
    QualityRow,
    SpeedFigures,
    SpeedRow,
    SpeedSettings,
    WrittenText,
)
from jaxgpt_bench.common.tables import (
    DIFFERENCE,
    KL_MEAN,
    LOSS,
    MODEL,
    QUALITY,
    SIZE,
    SPEED,
    TOP1,
    Column,
    computed_by,
    filled,
    table,
)

TEMPLATES = Path(__file__).resolve().parent.parent
SHOWN_SAMPLES = 4
# The programs whose KV-cached speed stands for a quality row: the first that was measured.
SPEED_ROWS = {
    "flax-fp32": (("jaxgpt-flax", "fp32"),),
    "torch-fp32": (("jaxgpt-native", "fp32"), ("jaxgpt-torch", "fp32")),
    "int8-dynamic": (("jaxgpt-native", "int8-dynamic"), ("jaxgpt-torch", "int8-dynamic")),
    "int8-static": (("jaxgpt-native", "int8-static"), ("jaxgpt-torch", "int8-static")),
}
# The project that this one reimplements, as it published its own figures.
EARLIER = EarlierFigures(val_loss=(1.3223, 1.3350), size_mb=(620.33, 148.88), tokens_per_s=(2.95, 4.01))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow(QualityRow):
    """A quality row with the speed of its program, KV cache on; None where that was not measured."""

    tokens_per_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedSpeed(JsonData):
    """What a report keeps of speed figures, which may be another machine's."""

    cpu: str
    settings: SpeedSettings
    bandwidth_gb_s: tuple[float, ...]
    rows: tuple[SpeedRow, ...]
    noise: Noise | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFigures(JsonData):
    """All of report.json.

    Attributes:
      commit: that wrote it.
      train: summary of the run, and xz's bits a byte.
      parity: PyTorch's float32 logits against Flax's.
      models: one row each, the reference first.
      speed: the trained model's first.
      machine: that quality was measured on.
      date: of that.
    """

    commit: str
    train: dict[str, Any]
    parity: dict[str, Any]
    models: tuple[ModelRow, ...]
    speed: tuple[ReportedSpeed, ...]
    machine: Machine
    date: str


RATE = Column[ModelRow](
    "tokens/s after the first", lambda row: "" if row.tokens_per_s is None else rate_text(row.tokens_per_s)
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What INT8 changes, in three figures.

    Attributes:
      before: the float32 model's row.
      after: the INT8 model's.
    """

    before: ModelRow
    after: ModelRow

    @property
    def times_smaller(self) -> float:
        """How many times smaller the file becomes."""
        return self.before.size_mb / self.after.size_mb

    @property
    def times_faster(self) -> float | None:
        """How many times as many tokens a second; None where one was not measured."""
        before, after = self.before.tokens_per_s, self.after.tokens_per_s
        return after / before if before and after else None

    def sentence(self) -> str:
        """Say it in words."""
        loss = self.after.val_loss - self.before.val_loss
        unclear = is_within_error(loss, self.after.difference_error)
        return verdict_sentence(self.after.name, self.times_smaller, self.times_faster, loss, unclear)


def verdict(models: Sequence[ModelRow]) -> Verdict | None:
    """Compare the first INT8 model with PyTorch's float32 one, or with the first; None without any INT8."""
    after = next((row for row in models if row.name.startswith("int8")), None)
    before = next((row for row in models if row.name == "torch-fp32"), models[0])
    return None if after is None else Verdict(before, after)


def report_figures(
    train: Mapping[str, Any],
    parity: dict[str, Any],
    quality: QualityFigures,
    speeds: Sequence[SpeedFigures],
) -> ReportFigures:
    """Gather what report.json holds."""
    return ReportFigures(
        commit=commit(),
        train={**train, "xz_bits_per_byte": quality.xz_bits_per_byte},
        parity=parity,
        models=tuple(model_row(row, speeds[0].rows) for row in quality.rows),
        speed=tuple(
            ReportedSpeed(
                cpu=speed.machine.cpu,
                settings=speed.settings,
                bandwidth_gb_s=speed.bandwidth_gb_s,
                rows=speed.rows,
                noise=speed.noise,
            )
            for speed in speeds
        ),
        machine=quality.machine,
        date=quality.date,
    )


def model_row(row: QualityRow, speeds: Sequence[SpeedRow]) -> ModelRow:
    """Join a quality row with the speed of its program (KV cache); None where that was not measured."""
    found = [
        line.decode_tokens_per_s.median
        for wanted in SPEED_ROWS.get(row.name, ())
        for line in speeds
        if (line.engine, line.precision) == wanted and line.cached
    ]
    return ModelRow(**vars(row), tokens_per_s=found[0] if found else None)


def render(
    figures: ReportFigures,
    quality: QualityFigures,
    speeds: Sequence[SpeedFigures],
    metrics: Sequence[dict[str, Any]],
    certificate: dict[str, Any],
) -> str:
    """Fill the page's template."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    names = list(quality.samples)
    every = max(len(quality.prompts) // SHOWN_SAMPLES, 1)
    samples = [
        {"prompt": prompt, "texts": _distinct([(name, quality.samples[name][index]) for name in names])}
        for index, prompt in enumerate(quality.prompts)
        if index % every == 0
    ]
    return environment.get_template("report/page.html.jinja").render(
        figures=figures,
        verdict=verdict(figures.models),
        rate_text=rate_text,
        computed_by=computed_by,
        without_folders=without_folders,
        train=figures.train,
        quality=quality,
        quality_table=table(filled([*QUALITY, RATE], figures.models), figures.models),
        certificate=certificate,
        loss_svg=loss_curve(metrics),
        speeds=[(speed, speed_bars(speed.rows, speed_title(speed.settings))) for speed in speeds],
        samples=samples,
        earlier=EARLIER,
    )


def _distinct(texts: Sequence[tuple[str, WrittenText]]) -> list[tuple[str, WrittenText]]:
    """Join the names of models that wrote the same text."""
    found: dict[str, tuple[list[str], WrittenText]] = {}
    for name, text in texts:
        found.setdefault(text.text, ([], text))[0].append(name)
    return [(", ".join(names), text) for names, text in found.values()]


def markdown_block(figures: ReportFigures) -> str:
    """Return the tables of docs/results.md."""
    train, machine = figures.train, figures.machine
    lines = [
        f"Preset {train['preset']}, {train['parameters']:,} parameters, {train['steps']} steps, "
        f"{train['tokens_seen']:,} tokens, {train['cpu_seconds']:.0f} cpu-seconds on {machine.cpu} "
        f"({machine.cores} cores): {train['val_bits_per_byte']:.3f} bits per byte on held-out files "
        f"(xz -9e on the same bytes: {train['xz_bits_per_byte']:.3f}).",
        "",
        table([MODEL, LOSS, DIFFERENCE, KL_MEAN, TOP1, SIZE, RATE], figures.models).markdown(),
    ]
    for speed in figures.speed[1:]:
        title = f"Speed on {speed.cpu}, {speed_title(speed.settings)}, batch 1, greedy:"
        lines += ["", title, "", table(SPEED, speed.rows).markdown()]
    return "\n".join(lines)
