"""What `jaxgpt-bench reproduce` may be told."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt_bench.reproduce.recipes import RECIPES

Redo = Literal[
    "profile", "convert", "quantize", "quality", "samples", "answers", "other-text", "memorization", "speed"
]  # fmt: skip
Stage = Literal[
    "data", "plan", "profile", "train", "qat", "convert", "quantize",
    "quality", "samples", "answers", "other-text", "memorization", "speed",
]  # fmt: skip
PRESETS = "; ".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items())


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Train a GPT-2, quantize it to 8 and 4 bits and put what was measured on one page; again, to go on.

    Attributes:
      preset: one of recipes.RECIPES.
      out: folder of everything.
      source: text to train on: auto (flytech/python-codes-25k where the hub can be reached, else the preset's
        offline text), offline, or what `jaxgpt prepare --source` takes.
      run: a finished run to take instead of training one; its own data set is taken with it.
      max_steps: of the training, instead of the preset's.
      minutes: for everything, over all calls: a step is timed, and steps and amounts are chosen to end in it.
      stage: end after this stage: data, plan, profile, train, convert, qat, quantize, quality, samples,
        answers, other-text, memorization or speed.
      budget_seconds: end this call in that time, with everything saved and exit code 75; the same command
        goes on.
      other_text: FILE.jsonl with a column text, or 'FILE.jsonl=what it is': the loss on it is measured too;
        may be given several times. What an earlier call measured on these models stays in the report.
      threads: CPU threads of the speed measurement; 0 takes all cores that this process may use.
      rounds: of the speed measurement, instead of the preset's.
      redo: stage to do again although its results fit; may be given several times.
      readme: text whose table between the markers `<!-- reproduction: begin -->` and `end` is written anew.
      accept_noise: write it however busy the machine was when speed was measured; report.json says so.
      json: print report.json on stdout.
    """

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=PRESETS)]
    out: Path
    source: str = "auto"
    run: Path | None = None
    max_steps: int | None = None
    minutes: float | None = None
    stage: Stage | None = None
    budget_seconds: float | None = None
    other_text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    threads: int = 0
    rounds: int | None = None
    redo: Annotated[tuple[Redo, ...], tyro.conf.UseAppendAction] = ()
    readme: Path | None = None
    accept_noise: bool = False
    json: bool = False
