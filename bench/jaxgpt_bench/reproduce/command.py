"""`jaxgpt-bench reproduce`: the earlier project's experiment, from the text to one page.

    jaxgpt-bench reproduce cpu --out runs/reference
    jaxgpt-bench reproduce gpu --out runs/gpt2 --other-text 'rows.jsonl=real rows of another data set'

prepare, train, train on for quantization, convert, quantize to 8 and 4 bits, then measure: quality, samples,
text from elsewhere, what is word for word from the training text, speed. Everything lies in one folder; run
again, the same command keeps what fits (see stages.py) and does the rest. report.json holds every figure of
report.html.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.shared.console import Result, say
from jaxgpt_bench.common.formatting import without_folders
from jaxgpt_bench.reproduce.minutes.modules import require_modules
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.recipes import Recipe, find_recipe

if TYPE_CHECKING:
    from jaxgpt_bench.reproduce.other_text import OtherText
    from jaxgpt_bench.reproduce.stages import Stages, StoppedError


# What its stages import; `peers` that are not there are left out of the speed measurement.
MODULES = (
    *("jax", "flax", "optax", "orbax", "tensorboardX", "torch", "transformers"),
    *("safetensors", "tokenizers", "jinja2", "matplotlib", "psutil"),
)


def reproduce(options: ReproduceOptions) -> Result:
    """Run `jaxgpt-bench reproduce`; exit code 1: a check of a stage failed; 75: the same command goes on."""
    recipe = find_recipe(options.preset, options.max_steps)
    require_modules(MODULES)
    from jaxgpt_bench.reproduce.checks import check
    from jaxgpt_bench.reproduce.minutes.clock import Clock
    from jaxgpt_bench.reproduce.stages import Stages

    others = check(options, recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = Stages(options.redo, until=options.stage)
    if options.minutes is None and options.budget_seconds is None:
        return run_stages(options, recipe, stages, others)
    with Clock(options.out, options.budget_seconds) as stages.clock:
        return run_stages(options, recipe, stages, others)


def run_stages(
    options: ReproduceOptions, recipe: Recipe, stages: "Stages", others: "list[OtherText]"
) -> Result:
    """Do what is not done yet, and write the page and the results."""
    from jaxgpt_bench.common.markdown_blocks import write_between_markers
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.common.rows import Noise
    from jaxgpt_bench.noise.verdict import refuse
    from jaxgpt_bench.reproduce.build import build
    from jaxgpt_bench.reproduce.measure import measure
    from jaxgpt_bench.reproduce.minutes.results import write_results
    from jaxgpt_bench.reproduce.page.render import markdown_block, report_figures, write_page
    from jaxgpt_bench.reproduce.stages import StoppedError

    try:
        models, recipe = build(options, recipe, stages)
        measured = measure(options, recipe, stages, models, others)
    except StoppedError as stop:
        say_stopped(options, stop)
        if stages.clock is not None:
            write_results(options.out, stages.clock)
        return stop.result
    asked = {"preset": options.preset, "about": recipe.about, "command": command_line(options)}
    figures = {
        **provenance().to_json(),
        **report_figures(
            recipe, models.dataset, models.run, models.artifacts[0], measured, stages.log, asked
        ),
    }
    noise = figures["speed"].get("noise")
    if noise and options.accept_noise:
        noise["accepted"] = True
    write_page(options.out, figures)
    say(f"wrote {options.out / 'report.html'} and {options.out / 'report.json'}")
    if stages.clock is not None:
        write_results(options.out, stages.clock)
    if options.readme is not None:
        refuse(str(options.readme), {"speed": Noise.from_json(noise) if noise else None})
        write_between_markers(options.readme, "reproduction", markdown_block(figures))
    return Result(figures)


def say_stopped(options: ReproduceOptions, stop: "StoppedError") -> None:
    """Say in a line where it stopped, why, what is left, and what goes on from there."""
    from jaxgpt_bench.reproduce.stages import ORDER

    stage, why = stop.result.figures["stage"], stop.result.figures["why"]
    left = ", ".join(ORDER[ORDER.index(stage) :])
    program = "python3 -m jaxgpt_bench" if Path(sys.argv[0]).parent.name == "jaxgpt_bench" else "jaxgpt-bench"
    words = command_words(dataclasses.replace(options, stage=None))
    for name in options.redo:
        if ORDER.index(name) >= ORDER.index(stage):
            words += ["--redo", name]
    if options.readme is not None:
        words += ["--readme", str(options.readme)]
    if options.accept_noise:
        words.append("--accept-noise")
    again = "to go on" if stop.result.passed else "again"
    say(f"stopped in {stage}: {why}; left: {left}; {again}: {program} {shlex.join(words)}")


def command_line(options: ReproduceOptions) -> str:
    """Return the command that was given, without what only repeats, cuts or prints."""
    whole = dataclasses.replace(options, stage=None, budget_seconds=None)
    return without_folders(shlex.join(["jaxgpt-bench", *command_words(whole)]))


def command_words(options: ReproduceOptions) -> list[str]:
    """Return the command that was given, from `reproduce` on, without what only repeats or prints."""
    words = ["reproduce", options.preset, "--out", str(options.out)]
    if options.source != "auto":
        words += ["--source", options.source]
    for name in ("run", "max_steps", "minutes", "rounds", "stage", "budget_seconds"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    for given in options.other_text:
        words += ["--other-text", given]
    if options.threads:
        words += ["--threads", str(options.threads)]
    return words
