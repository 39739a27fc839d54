"""`jaxgpt-bench reproduce`: the earlier project's experiment, from the text to one page.

    jaxgpt-bench reproduce cpu --out runs/reference
    jaxgpt-bench reproduce gpu --out runs/gpt2 --other-text 'rows.jsonl=real rows of another data set'

prepare, train, train on for quantization, convert, quantize by every method, then measure: quality, samples,
text from elsewhere, what is word for word from the training text, speed. Everything lies in one folder; run
again, the same command keeps what fits (see stages.py) and does the rest. report.json holds every figure of
report.html.
"""

import shlex

from jaxgpt.shared.console import Result, say
from jaxgpt_bench.common.formatting import without_folders
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.recipes import find_recipe


def reproduce(options: ReproduceOptions) -> Result:
    """Run `jaxgpt-bench reproduce`; exit code 1 when a check of a stage fails."""
    recipe = find_recipe(options.preset, options.max_steps)
    from jaxgpt_bench.common.markdown_blocks import write_between_markers
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.reproduce.build import build
    from jaxgpt_bench.reproduce.checks import check
    from jaxgpt_bench.reproduce.measure import measure
    from jaxgpt_bench.reproduce.page.render import markdown_block, report_figures, write_page
    from jaxgpt_bench.reproduce.stages import Stages, StoppedError

    others = check(options, recipe)
    stages = Stages(options.redo)
    try:
        models = build(options, recipe, stages)
        measured = measure(options, recipe, stages, models, others)
    except StoppedError as stop:
        say(f"stopped in {stop.result.figures['stage']}; the same command goes on from there")
        return stop.result
    asked = {"preset": options.preset, "about": recipe.about, "command": command_line(options)}
    figures = {
        **provenance().to_json(),
        **report_figures(
            recipe, models.dataset, models.run, models.artifacts[0], measured, stages.log, asked
        ),
    }
    write_page(options.out, figures)
    if options.readme is not None:
        write_between_markers(options.readme, "reproduction", markdown_block(figures))
    say(f"wrote {options.out / 'report.html'} and {options.out / 'report.json'}")
    return Result(figures)


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
    return without_folders(shlex.join(words))
