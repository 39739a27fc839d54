"""`jaxgpt-bench recipe`: steps and cpu-seconds to a fixed validation loss, a row a change of the recipe.

    jaxgpt prepare --source stdlib --tokenizer bpe:2048 --val-fraction 0.08 --out data/stdlib
    jaxgpt-bench recipe --data data/stdlib --out recipe.json
    jaxgpt-bench recipe --data data/stdlib --out recipe.json --rows adamw muon split-qkv --seeds 0

The target is the loss that tuned AdamW has at its longest training. Every row changes one thing of Muon's;
the last has all that paid. Trainings take one core each and can be stopped at any time: the same command goes
on from what the JSON file holds. Rows are in rows.py, what the columns rest on in figures.py.
"""

import dataclasses
from typing import Any

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError, damaged, nearest
from jaxgpt.shared.files import prepare_output_file, read_json, write_json
from jaxgpt.shared.presets import PRESETS
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import Provenance
from jaxgpt_bench.common.tables import Column, table
from jaxgpt_bench.recipe.cost import muon_cost
from jaxgpt_bench.recipe.figures import RecipeRow, loss_text, recipe_rows
from jaxgpt_bench.recipe.options import RecipeOptions
from jaxgpt_bench.recipe.page import AGAINST_MUON, SHARE_OF_ADAMW, STEPS_TO_TARGET
from jaxgpt_bench.recipe.rows import ROWS, SHAPES, TRIALS, is_current, runs_of, trial_runs
from jaxgpt_bench.recipe.runs import Outcome, Run, missing, take

GPT2_VOCAB_SIZE = 50_257


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFigures(Provenance):
    """What `jaxgpt-bench recipe` leaves.

    Attributes:
      data: source, tokenizer and hash of the data set.
      shape: of model and batch.
      muon_cost: floating point operations of a step of gpt2 with Muon, as a multiple of one with AdamW.
      rows: of the table.
      outcomes: every training.
    """

    data: dict[str, Any]
    shape: dict[str, int]
    muon_cost: float
    rows: tuple[RecipeRow, ...] = ()
    outcomes: tuple[Outcome, ...] = ()


def recipe(options: RecipeOptions) -> Result:
    """Run `jaxgpt-bench recipe`.

    Raises:
      UserError: options that don't fit, or a file of another data set or shape.
    """
    wanted = _wanted(options)
    prepare_output_file(options.out)
    dataset = open_dataset(options.data)
    about = {"source": dataset.manifest["source"], "tokenizer": dataset.manifest["tokenizer"]["name"]}
    about["sha256"] = dataset.sha256
    earlier = _earlier(options, about)
    ahead = missing(wanted, earlier)
    say(f"{len(ahead)} of {len(wanted)} trainings are ahead, {options.jobs} at a time")
    figures = RecipeFigures(
        **vars(provenance()),
        data=about,
        shape=SHAPES[options.shape],
        muon_cost=_cost_at_gpt2(),
        rows=recipe_rows(_of_table(earlier)),
        outcomes=earlier,
    )

    def keep(outcome: Outcome) -> None:
        nonlocal figures
        now = provenance()
        outcome = dataclasses.replace(outcome, date=now.date, commit=now.commit, cpu=now.machine.cpu)
        outcomes = (*figures.outcomes, outcome)
        figures = dataclasses.replace(figures, outcomes=outcomes, rows=recipe_rows(_of_table(outcomes)))
        write_json(options.out, figures.to_json())
        run = outcome.run
        loss = "no number" if outcome.val_loss is None else f"{outcome.val_loss:.4f}"
        say(f"{run.row}, {run.steps} steps, seed {run.seed}: {loss}")

    take(ahead, SHAPES[options.shape], options.data, options.jobs, keep)
    stderr.print(table(COLUMNS, figures.rows).terminal())
    say(
        f"a step of gpt2 with Muon costs {figures.muon_cost:.3f} times the floating point operations of one "
        "with AdamW"
    )
    return Result(figures.to_json())


def _wanted(options: RecipeOptions) -> list[Run]:
    """Return the runs that are asked for, the first seed's first."""
    if options.jobs < 1 or min(options.lengths, default=1) < 1:
        raise UserError("--jobs and --lengths must be at least 1")
    if not options.seeds or min(options.seeds) < 0:
        raise UserError("--seeds must be 0 or more")
    known, trials = ROWS[options.shape], {f"{name}-trials": name for name in TRIALS}
    names = options.rows or tuple(known)
    for name in names:
        if name not in {*known, *trials}:
            raise UserError(f"recipe has no row {name!r}; {nearest(name, [*known, *trials])}")
    found = [run for name in names if name in trials for run in trial_runs(trials[name], options.shape)]
    for seed in options.seeds:
        for name in names:
            if name in known:
                found += runs_of(name, options.shape, seed, options.lengths)
    return found


def _earlier(options: RecipeOptions, about: dict[str, Any]) -> tuple[Outcome, ...]:
    """Return what the file holds already."""
    if not options.out.exists():
        return ()
    held = read_json(options.out, "file of figures")
    with damaged(options.out, "give another --out"):
        earlier = RecipeFigures.from_json(held)
    if earlier.data.get("sha256") != about["sha256"] or earlier.shape != SHAPES[options.shape]:
        raise UserError(f"{options.out} holds trainings of another data set or shape; give another --out")
    return earlier.outcomes


def _of_table(outcomes: tuple[Outcome, ...]) -> list[Outcome]:
    """Leave out the trials, and what a row gave before it was changed: its name stayed."""
    return [
        outcome for outcome in outcomes if not outcome.run.row.endswith("-trials") and is_current(outcome.run)
    ]


def _cost_at_gpt2() -> float:
    preset = PRESETS["gpt2"]
    model: ModelConfig = preset.model(GPT2_VOCAB_SIZE)
    return muon_cost(model, preset.train.batch_size * model.block_size, split_qkv=preset.train.split_qkv)


COLUMNS = (
    Column[RecipeRow]("recipe", lambda row: row.name),
    Column[RecipeRow]("steps", lambda row: str(row.steps)),
    Column[RecipeRow]("loss", loss_text),
    *(AGAINST_MUON, STEPS_TO_TARGET, SHARE_OF_ADAMW),
    Column[RecipeRow]("cpu-ms a step", lambda row: f"{row.cpu_seconds_a_step * 1e3:.0f}"),
    Column[RecipeRow](
        "cpu-s to target",
        lambda row: "" if row.cpu_seconds_to_target is None else f"{row.cpu_seconds_to_target:.0f}",
    ),
)
