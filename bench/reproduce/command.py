"""`jaxgpt-bench reproduce`: the original project's experiment, from the text to one page.

    jaxgpt-bench reproduce cpu --out runs/reference
    jaxgpt-bench reproduce gpu --out runs/gpt2 --other-text 'rows.jsonl=real rows of another data set'

prepare, train, train on with rounding, convert, quantize by every method, then measure: quality, samples,
text from elsewhere, what is word for word from the training text, speed. Everything lies in one folder; run
again, the same command keeps what fits (see stages.py) and does the rest. report.json holds every figure of
report.html.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from bench.generate import GenerateOptions, generate
from bench.machine import describe_machine, provenance
from bench.markers import require_markers, write_between_markers
from bench.quality import SPREAD, Contender, QualityOptions, quality
from bench.reproduce.memorization import Corpus
from bench.reproduce.page import markdown_table, report_figures, write_page
from bench.reproduce.recipes import RECIPES, Recipe, find_recipe
from bench.reproduce.stages import (
    QUANTIZED,
    Stages,
    StoppedError,
    check_folders,
    converted,
    made_of_run,
    prepared,
    quantized,
    read_figures,
    trained,
    weights_sha256,
)
from bench.reproduce.texts import (
    PROMPTS,
    SEED,
    TEMPERATURES,
    OtherText,
    loss_on,
    open_models,
    other_documents,
    parse_other,
    samples,
    word_for_word,
)
from export.engine import library_path
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, sha256_of, write_json
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.tokens import Dataset, open_dataset

Redo = Literal["convert", "quantize", "quality", "samples", "other-text", "memorization", "speed"]
PRESETS = "; ".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items())


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Train a GPT-2, quantize it by every method and put what was measured on one page; again, to go on.

    Attributes:
      preset: one of recipes.RECIPES.
      out: folder of everything.
      source: text to train on: auto (flytech/python-codes-25k where the hub can be reached, else the preset's
        offline text), offline, or what `jaxgpt prepare --source` takes.
      run: a finished run to take instead of training one; its own data set is taken with it.
      max_steps: of the training, instead of the preset's.
      other_text: FILE.jsonl with a column text, or 'FILE.jsonl=what it is': the loss on it is measured too;
        may be given several times. What an earlier call measured on these models stays in the report.
      threads: CPU threads of the speed measurement; 0 takes all cores that this process may use.
      rounds: of the speed measurement, instead of the preset's.
      redo: stage to do again although its results fit; may be given several times.
      readme: text whose table between the markers `<!-- reproduction: begin -->` and `end` is written anew.
      json: print report.json on stdout.
    """

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=PRESETS)]
    out: Path
    source: str = "auto"
    run: Path | None = None
    max_steps: int | None = None
    other_text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    threads: int = 0
    rounds: int | None = None
    redo: Annotated[tuple[Redo, ...], tyro.conf.UseAppendAction] = ()
    readme: Path | None = None
    json: bool = False


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


@dataclasses.dataclass(frozen=True)
class Built:
    """What is measured.

    Attributes:
      dataset: that the run was trained on.
      run: the run folder.
      artifacts: float32 first.
      qat: the float32 artifact of the training with rounding, of which int8-static-qat was made; only its
        losses are compared, its speed is that of the other.
    """

    dataset: Dataset
    run: Path
    artifacts: list[Path]
    qat: Path | None

    @property
    def compared(self) -> list[Path]:
        """The artifacts whose losses are compared: float32 first, the parent before what was made of it."""
        first, *rest = self.artifacts
        return [first, *([] if self.qat is None else [self.qat]), *rest]

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The training split, to look runs up in."""
        return Corpus(self.dataset.train)

    def hashes(self, artifacts: list[Path]) -> dict[str, str]:
        """Return what tells these models and data from others."""
        weights = {path.name: weights_sha256(path) for path in artifacts}
        return {"data": self.dataset.sha256, "run": sha256_of(self.run / "config.json"), **weights}


def build(options: ReproduceOptions, recipe: Recipe, stages: Stages) -> Built:
    """Prepare, train, convert and quantize, as far as that is not done."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run is None:
        dataset = prepared(stages, options.out / "data", options.source, recipe)
        run = trained(stages, "train", options.out / "run", dict(recipe.train), dataset)
    else:
        dataset, run = taken_run(options.run, stages)
    fp32 = converted(stages, options.out / "fp32", run, dataset)
    parents = {"fp32": fp32}
    if recipe.qat is not None:
        settings = {**recipe.qat, "init": run, "qat": True}
        qat = trained(stages, "qat", options.out / "qat", settings, dataset)
        parents["fp32-qat"] = converted(stages, options.out / "fp32-qat", qat, dataset)
    artifacts = [
        quantized(stages, options.out / name, method, parents[parent], dataset)
        for name, method, parent in QUANTIZED
        if parent in parents
    ]
    return Built(dataset, run, [fp32, *artifacts], parents.get("fp32-qat"))


def taken_run(run: Path, stages: Stages) -> tuple[Dataset, Path]:
    """Return a given run and its data set.

    Raises:
      UserError: it is not finished, or its data set is gone or another one.
    """
    from jaxgpt.runs import open_run

    data = open_run(run).config.data
    read_json(run / "summary.json", "summary of a finished run")
    dataset = open_dataset(Path(data["folder"]))
    if dataset.sha256 != data["manifest_sha256"]:
        raise UserError(
            f"{dataset.folder} is not the data set that {run} was trained on; bring that one back"
        )
    stages.kept("data", f"{dataset.folder} is that of --run {run}", dataset.manifest)
    stages.kept("train", f"--run {run}", made_of_run(run))
    return dataset, run


def measure(
    options: ReproduceOptions, recipe: Recipe, stages: Stages, built: Built, others: list[OtherText]
) -> dict[str, Any]:
    """Measure what was built, as far as that is not done; speed last."""
    hashes, out = built.hashes(built.compared), options.out

    @functools.cache
    def opened() -> tuple[list[Contender], Tokenizer, int]:
        return open_models(built.compared, built.run, built.dataset)

    asked = QualityOptions(
        tuple(built.compared),
        built.dataset.folder,
        built.run,
        tokens=recipe.quality_tokens,
        samples=recipe.parse_samples,
        sample_tokens=recipe.parse_tokens,
    )
    amount = {key: getattr(asked, key) for key in ("tokens", "samples", "sample_tokens")}
    found: dict[str, Any] = {
        "quality": stages.measured(
            out / "quality.json",
            {**hashes, **amount, "windows": SPREAD},
            lambda: dict(quality(asked).figures),
        )
    }
    fixed = {"seed": SEED, "temperatures": TEMPERATURES, "prompts": PROMPTS, "tokens": recipe.tokens}
    found["samples"] = stages.measured(
        out / "samples.json",
        {**built.hashes(built.artifacts), **fixed},
        lambda: samples(opened()[0], opened()[1], recipe.tokens),
    )
    found["other_text"] = [
        *(measure_other(other, stages, out, hashes, opened, built) for other in others),
        *earlier_others(stages, out, hashes, [other.sha256 for other in others]),
    ]
    made_from = {"data": hashes["data"], "samples": sha256_of(out / "samples.json"),
                 "quality": sha256_of(out / "quality.json")}  # fmt: skip
    found["memorization"] = stages.measured(
        out / "memorization.json", made_from,
        lambda: word_for_word(built.corpus, built.dataset, opened()[1], found["samples"], found["quality"]),
    )  # fmt: skip
    found["speed"] = measure_speed(options, recipe, stages, built)
    return found


def measure_other(
    other: OtherText,
    stages: Stages,
    out: Path,
    hashes: dict[str, str],
    opened: Callable[[], tuple[list[Contender], Tokenizer, int]],
    built: Built,
) -> dict[str, Any]:
    """Measure the loss on text from elsewhere, as far as that is not done; name and words are the given."""
    path = out / f"other-text-{other.sha256[:12]}.json"

    def measure() -> dict[str, Any]:
        models, tokenizer, block_size = opened()
        return loss_on(other, models, tokenizer, block_size, built.corpus)

    figures = stages.measured(path, {**hashes, "file": other.sha256}, measure, "other-text")
    given = {"file": other.path.name, "about": other.about}
    if any(figures[key] != given[key] for key in given):
        figures = {**figures, **given}
        write_json(path, figures)
    return {key: value for key, value in figures.items() if key != "made"}


def earlier_others(
    stages: Stages, out: Path, hashes: dict[str, str], given: list[str]
) -> list[dict[str, Any]]:
    """Return what earlier calls measured on these models, on files that are not given this time.

    Args:
      stages: where it is noted.
      out: folder of everything.
      hashes: of models and data.
      given: hashes of the files that are given.
    """
    found = []
    for path in sorted(out.glob("other-text-*.json")):
        file = read_figures(path).get("made_from", {}).get("file")
        if file in given:
            continue
        figures = stages.earlier(path, {**hashes, "file": file})
        if figures is None:
            say(f"[{path.stem}] left out of the report; give its file with --other-text to measure it anew")
        else:
            say(f"[{path.stem}] stays in the report; remove {path} to leave it out")
            found.append({key: value for key, value in figures.items() if key != "made"})
    return found


def measure_speed(options: ReproduceOptions, recipe: Recipe, stages: Stages, built: Built) -> dict[str, Any]:
    """Measure tokens a second of every model and of the engines that compete, on this machine."""
    machine, engine = describe_machine(), library_path()
    asked = GenerateOptions(
        artifact=tuple(built.artifacts),
        run=built.run,
        tokens=recipe.tokens,
        threads=options.threads,
        rounds=options.rounds or recipe.rounds,
        peers=True,
    )
    settings = {"tokens": asked.tokens, "threads": asked.threads, "rounds": asked.rounds,
                "cpu": machine["cpu"], "cores": machine["cores"], "python": machine["python"],
                **machine["packages"], "engine": sha256_of(engine) if engine.exists() else None}  # fmt: skip
    threads = torch.get_num_threads()
    try:
        return stages.measured(
            options.out / "speed.json",
            {**built.hashes(built.artifacts), **settings},
            lambda: dict(generate(asked).figures),
        )
    finally:
        torch.set_num_threads(threads)


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
