"""`jaxgpt-bench report`: one self-contained page, report.json, and a table for docs/.

    jaxgpt-bench report --run RUN --fp32 ART --quality quality.json --speed speed.json ... --out FOLDER

Everything on the page comes from files that the other commands wrote; nothing is typed in.
"""

import dataclasses
from pathlib import Path

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import check_output_folder, read_json, write_atomic, write_json
from jaxgpt_bench.common.rows import QualityFigures, SpeedFigures


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Put the measured figures on one page.

    Attributes:
      run: run folder.
      fp32: float32 artifact, for its certificate.
      quality: JSON file of `jaxgpt-bench quality --out`.
      speed: JSON files of `jaxgpt-bench generate --out`; the first is the trained model's.
      out: folder for report.html and report.json.
      readme: text whose table between the markers `<!-- table: begin -->` and `end` is written anew.
      accept_noise: write --readme however busy the machine was when its speed was measured; report.json says
        so.
      json: print report.json on stdout.
    """

    run: Path
    fp32: Path
    quality: Path
    speed: tuple[Path, ...]
    out: Path
    readme: Path | None = None
    accept_noise: bool = False
    json: bool = False


def report(options: ReportOptions) -> Result:
    """Run `jaxgpt-bench report`."""
    from jaxgpt.training.run.folder import read_metrics  # imports JAX
    from jaxgpt.training.run.summary import read_summary
    from jaxgpt_bench.common.markdown_blocks import require_markers, write_between_markers
    from jaxgpt_bench.noise.verdict import accepted, refuse
    from jaxgpt_bench.report.page import markdown_block, render, report_figures

    check_output_folder(options.out)
    if options.readme is not None:
        require_markers(options.readme, "table")
    metrics = read_metrics(options.run)
    quality = read_quality(options.quality)
    speeds = [read_speed(path) for path in options.speed]
    if options.accept_noise:
        speeds = [dataclasses.replace(speed, noise=accepted(speed.noise)) for speed in speeds]
    if not speeds or not metrics:
        raise UserError(
            f"a report needs --speed figures and a run with metrics; {options.run} has {len(metrics)}"
        )
    if speeds[0].settings.preset is not None:
        raise UserError(
            f"{options.speed[0]} is of random weights of the shape of {speeds[0].settings.preset}; give the "
            "trained model's speed first"
        )
    train = read_summary(options.run)
    certificate = read_json(options.fp32 / "certificate.json", "certificate")
    figures = report_figures(train, certificate["parity"], quality, speeds)
    options.out.mkdir(parents=True, exist_ok=True)
    page = render(figures, quality, speeds, metrics, certificate)
    written = figures.to_json()
    write_atomic(options.out / "report.html", page)
    write_json(options.out / "report.json", written)
    say(f"wrote {options.out / 'report.html'} and {options.out / 'report.json'}")
    if options.readme is not None:
        noises = {str(path): speed.noise for path, speed in zip(options.speed, speeds, strict=True)}
        refuse(str(options.readme), noises)
        write_between_markers(options.readme, "table", markdown_block(figures))
    return Result(written)


def read_quality(path: Path) -> QualityFigures:
    """Read what `jaxgpt-bench quality` wrote; UserError where it did not."""
    found = read_json(path, "quality figures")
    with damaged(path, "give what `jaxgpt-bench quality --out` wrote"):
        return QualityFigures.from_json(found)


def read_speed(path: Path) -> SpeedFigures:
    """Read what `jaxgpt-bench generate` wrote; UserError where it did not."""
    found = read_json(path, "speed figures")
    with damaged(path, "give what `jaxgpt-bench generate --out` wrote"):
        return SpeedFigures.from_json(found)
