"""`jaxgpt-bench reproduce`: the original project's experiment, from the text to one page.

    jaxgpt-bench reproduce cpu --out runs/reference
    jaxgpt-bench reproduce gpu --out runs/gpt2 --other-text 'rows.jsonl=real rows of another data set'

prepare, train, train on with rounding, convert, quantize by every method, then measure: quality, samples,
text from elsewhere, what is word for word from the training text, speed. Everything lies in one folder; run
again, the same command keeps what fits (see stages.py) and does the rest. report.json holds every figure of
report.html.
"""

import shlex

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.markdown_blocks import require_markers, write_between_markers
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.reproduce.build import build
from jaxgpt_bench.reproduce.made import StoppedError, check_folders
from jaxgpt_bench.reproduce.measure import measure
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.other_text import OtherText, other_documents, parse_other
from jaxgpt_bench.reproduce.page import markdown_table, report_figures, write_page
from jaxgpt_bench.reproduce.recipes import Recipe, find_recipe
from jaxgpt_bench.reproduce.stages import Stages


def reproduce(options: ReproduceOptions) -> Result:
    """Run `jaxgpt-bench reproduce`; exit code 1 when a check of a stage fails."""
    recipe = find_recipe(options.preset, options.max_steps)
    others = check(options, recipe)
    stages = Stages(options.redo)
    try:
        models = build(options, recipe, stages)
        measured = measure(options, recipe, stages, models, others)
    except StoppedError as stop:
        say(f"stopped in {stop.result.figures['stage']}; the same command goes on from there")
        return stop.result
    figures = report_figures(
        recipe, models.dataset, models.run, models.artifacts[0], measured, stages.log,
        {"preset": options.preset, "about": recipe.about, "command": command_line(options)},
    )  # fmt: skip
    figures = {**provenance(), **figures}
    write_page(options.out, figures)
    if options.readme is not None:
        write_between_markers(options.readme, "reproduction", markdown_table(figures))
    say(f"wrote {options.out / 'report.html'} and {options.out / 'report.json'}")
    return Result(figures)


def check(options: ReproduceOptions, recipe: Recipe) -> list[OtherText]:
    """Refuse now what would fail hours later; return the texts from elsewhere.

    Raises:
      UserError: an option that can't be meant, a source that is not there, a folder of something else.
    """
    if options.rounds is not None and options.rounds < 1:
        raise UserError(f"--rounds ({options.rounds}) must be at least 1")
    if options.threads < 0:
        raise UserError(f"--threads ({options.threads}) must be 0 (all that there are) or more")
    if options.run is not None and (options.source != "auto" or options.max_steps is not None):
        raise UserError("--run brings a training and its data: leave --source and --max-steps out")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file, expected a folder; choose another --out")
    if "other-text" in options.redo and not options.other_text:
        raise UserError("--redo other-text measures files: give them with --other-text")
    others = [parse_other(given) for given in options.other_text]
    for other in others:
        other_documents(other)
    if options.run is None and not (options.out / "data" / "manifest.json").exists():
        check_source(recipe.offline_source if options.source == "offline" else options.source)
    check_folders(options.out, takes_run=options.run is not None)
    if options.readme is not None:
        require_markers(options.readme, "reproduction")
    return others


def check_source(source: str) -> None:
    """Refuse a source that is not there, as far as that can be told without the hub.

    Raises:
      UserError: nothing of that name can be read.
    """
    from jaxgpt.data.sources import open_source

    if source not in ("auto", "hub") and not source.startswith("hub:"):
        open_source(source)


def command_line(options: ReproduceOptions) -> str:
    """Return the command that was given, without what only repeats or prints."""
    words = ["jaxgpt-bench", "reproduce", options.preset, "--out", str(options.out)]
    if options.source != "auto":
        words += ["--source", options.source]
    for name in ("run", "max_steps", "rounds"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for given in options.other_text:
        words += ["--other-text", given]
    if options.threads:
        words += ["--threads", str(options.threads)]
    return shlex.join(words)
