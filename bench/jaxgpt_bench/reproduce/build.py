"""Prepared, trained, converted, quantized: what a reproduction measures, made where it is not there."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt.shared.errors import UserError, brief
from jaxgpt.shared.files import check_replaceable, sha256_of, write_atomic
from jaxgpt_bench.evaluate.requests import REQUESTS
from jaxgpt_bench.reproduce.artifacts import converted, quantized, weights_sha256
from jaxgpt_bench.reproduce.memorization import Corpus
from jaxgpt_bench.reproduce.minutes.plan import (
    PLAN,
    UNPLANNED_SAVING_S,
    Asked,
    Plan,
    fitted,
    planned,
    read_plan,
    unplanned_needs_s,
    with_amounts,
)
from jaxgpt_bench.reproduce.minutes.step_profile import profile_command, step_profile
from jaxgpt_bench.reproduce.options import ReproduceOptions
from jaxgpt_bench.reproduce.other_text import parse_other
from jaxgpt_bench.reproduce.recipes import HUB_SOURCE, Recipe
from jaxgpt_bench.reproduce.stages import Stages, made_by_removing
from jaxgpt_bench.reproduce.training_run import made_of_run, trained

# Method of `jaxgpt-export quantize` (row of the tables and folder too), the folder it is made from.
QUANTIZED = (
    ("int8-dynamic", "fp32"),
    ("int8-static", "fp32"),
    ("int8-static-qat", "fp32-qat"),
    ("int8-weight-only", "fp32"),
    ("int4-weight-only", "fp32"),
)
# The form in which requests are asked; of .py files `--code requests` has it by itself.
TEMPLATE, HELD_OUT = "{instruction}\n{output}", "held_out.txt"
BYTES_A_TOKEN = 3  # of text, about
# What tells an output folder that is filled by and by; the others appear whole, with a certificate.
MARKERS = {"data": "manifest.json", "run": "config.json", "qat": "config.json"}


@dataclasses.dataclass(frozen=True)
class Built:
    """What is measured.

    Attributes:
      dataset: that the run was trained on.
      run: the run folder.
      artifacts: float32 first.
      qat: the float32 artifact of the quantization-aware training, of which int8-static-qat was made; only
        its losses are compared, its speed is that of the other.
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


def build(options: ReproduceOptions, recipe: Recipe, stages: Stages) -> tuple[Built, Recipe]:
    """Prepare, plan, train, convert and quantize, as far as that is not done.

    Returns:
      What was built, and the recipe with what was planned.
    """
    plan: Plan | None = None
    saving_s = UNPLANNED_SAVING_S
    stages.needs_s = unplanned_needs_s
    if options.run is None:
        dataset = prepared(stages, options.out / "data", options.source, recipe)
        plan = planned_here(stages, options, recipe, dataset)
        if plan is not None:
            recipe, stages.needs_s, saving_s = plan.applied(recipe), plan.needs_s, plan.saving_s
            profiled(stages, options.out / "profile.json", plan, recipe)
        run = trained(stages, "train", options.out / "run", dict(recipe.train), dataset, saving_s)
    else:
        dataset, run = taken_run(options.run, stages)
    fp32 = converted(stages, options.out / "fp32", run, dataset, recipe.sampling)
    parents = {"fp32": fp32}
    if recipe.qat is not None:
        settings = {**recipe.qat, "init": run, "qat": True}
        qat = trained(stages, "qat", options.out / "qat", settings, dataset, saving_s)
        parents["fp32-qat"] = converted(stages, options.out / "fp32-qat", qat, dataset, recipe.sampling)
    artifacts = [
        quantized(stages, options.out / method, method, parents[parent], dataset)
        for method, parent in QUANTIZED
        if parent in parents
    ]
    if plan is not None and plan.minutes is not None:
        assert stages.clock is not None
        if plan.amounts is None:
            plan = with_amounts(plan, asked_of(options, plan.minutes), recipe, dataset, stages.clock)
            plan.write(options.out)
        recipe, stages.needs_s = plan.applied(recipe), plan.needs_s
    return Built(dataset, run, [fp32, *artifacts], parents.get("fp32-qat")), recipe


def planned_here(stages: Stages, options: ReproduceOptions, recipe: Recipe, dataset: Dataset) -> Plan | None:
    """Return what the preset becomes on this device and in the minutes given, planned where that is not done.

    Raises:
      UserError: the folder has another plan, the minutes are too few, or the training fits no device.
    """
    plan = read_plan(options.out, options.preset, options.minutes)
    if plan is not None:
        if plan.data != dataset.sha256:
            raise UserError(f"{options.out / PLAN} is of another data set; choose another --out")
        say(f"[plan] kept: {plan.length or 'the device was asked'}")
        return plan
    if options.minutes is None and not recipe.fits_device:
        return None
    with stages.doing("plan", "trying the training on this device"):
        if options.minutes is None:
            plan = fitted(recipe, options.preset, dataset)
        else:
            assert stages.clock is not None
            plan = planned(asked_of(options, options.minutes), recipe, dataset, stages.clock)
        plan.write(options.out)
    return plan


def asked_of(options: ReproduceOptions, minutes: float) -> Asked:
    """Return what a plan is made for."""
    others = [parse_other(given) for given in options.other_text]
    return Asked(
        preset=options.preset,
        minutes=minutes,
        budget_s=options.budget_seconds,
        methods=len(QUANTIZED),
        other_tokens=round(sum(other.path.stat().st_size for other in others) / BYTES_A_TOKEN),
    )


def profiled(stages: Stages, path: Path, plan: Plan, recipe: Recipe) -> None:
    """Write where a step's time goes, on a GPU; before anything of this process is on it."""
    if plan.platform == "gpu":
        command = profile_command(recipe, plan.attempts["train"])
        stages.measured(path, {"command": command}, lambda: step_profile(command))


def taken_run(run: Path, stages: Stages) -> tuple[Dataset, Path]:
    """Return a given run and its data set.

    Raises:
      UserError: it is not finished, or its data set is gone or another one.
    """
    from jaxgpt.training.run.folder import open_run
    from jaxgpt.training.run.summary import read_summary

    data = open_run(run).config.data
    read_summary(run)
    dataset = open_dataset(Path(data["folder"]))
    if dataset.sha256 != data["manifest_sha256"]:
        raise UserError(
            f"{dataset.folder} is not the data set that {run} was trained on; bring that one back"
        )
    stages.kept("data", f"{dataset.folder} is that of --run {run}", dataset.manifest)
    stages.kept("train", f"--run {run}", made_of_run(run))
    return dataset, run


def check_folders(out: Path, takes_run: bool) -> None:
    """Refuse an output folder that holds something else, before hours of work end there.

    Args:
      out: folder of everything.
      takes_run: a run elsewhere is taken, with its data.

    Raises:
      UserError: one does; nothing was touched.
    """
    for name, marker in MARKERS.items():
        folder = out / name
        foreign = not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
        used = name == "qat" or not takes_run
        if used and folder.exists() and foreign and not (folder / marker).exists():
            raise UserError(
                f"{folder} holds no {marker}, so it is something else; move it away, or choose another --out"
            )
    for name in ("fp32", "fp32-qat", *(method for method, _ in QUANTIZED)):
        check_replaceable(out / name, True, "certificate.json")


def choose_source(wanted: str, recipe: Recipe) -> str:
    """Turn --source into what `jaxgpt prepare` takes; "auto" asks whether the hub answers."""
    if wanted == "offline":
        return recipe.offline_source
    if wanted != "auto":
        return wanted
    from jaxgpt.data.sources import open_source

    try:
        open_source(HUB_SOURCE)
    except (UserError, ModuleNotFoundError) as error:
        say(
            f"[data] {HUB_SOURCE.removeprefix('hub:')} is out of reach ({error}); "
            f"so the text is {brief(recipe.offline_source)} instead, which is NOT the earlier project's data"
        )
        return recipe.offline_source
    return HUB_SOURCE


def prepared(stages: Stages, folder: Path, wanted: str, recipe: Recipe) -> Dataset:
    """Return the data set of a folder, prepared where there is none.

    Raises:
      UserError: the folder holds another one.
    """
    if not (folder / "manifest.json").exists():
        source = choose_source(wanted, recipe)
        from jaxgpt.data.prepare import PrepareOptions, prepare

        reading = reading_options(recipe, source, folder.parent / HELD_OUT)
        with stages.doing("data", f"preparing {brief(source)}"):
            prepare(PrepareOptions(folder, source, recipe.tokenizer, recipe.val_fraction, **reading))
        return open_dataset(folder)
    with made_by_removing(folder):
        dataset = open_dataset(folder)
    manifest = dataset.manifest
    asked = {"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction,
             "code": "requests" if recipe.answers else "pairs"}  # fmt: skip
    there = {
        "code": manifest.get("reading", {}).get("code", "pairs"),
        "tokenizer": manifest["tokenizer"]["name"],
        "val_fraction": manifest.get("split", {}).get("val_fraction"),
    }
    if wanted != "auto":
        asked["source"], there["source"] = choose_source(wanted, recipe), manifest.get("source")
    if recipe.answers:
        asked["answers_only"] = True
        there["answers_only"] = "val.mask.bin" in manifest["files"]
    if str(manifest.get("source")).startswith("packages:"):
        for key in ("include", "exclude"):
            asked[key] = [*recipe.files.get(key, ())]
            there[key] = manifest.get("reading", {}).get(key, [])
    if different := [
        f"{key} was {brief(str(there[key]))}, now {brief(str(asked[key]))}"
        for key in asked
        if asked[key] != there[key]
    ]:
        raise UserError(
            f"{folder} was prepared otherwise ({'; '.join(different)}); "
            "choose another --out, or the settings that were"
        )
    stages.kept("data", f"{folder} holds {brief(str(manifest.get('source')))}, hashes fit", manifest)
    return dataset


def reading_options(recipe: Recipe, source: str, held_out: Path) -> dict[str, Any]:
    """Return what `jaxgpt prepare` is told beside the source; writes the requests that are held out."""
    files = recipe.files if source.startswith("packages:") else {}
    if not recipe.answers:
        return {**files}
    write_atomic(held_out, "".join(f"{request.text}\n" for request in REQUESTS))
    asking = {"code": "requests", "template": TEMPLATE, "held_out": held_out}
    return {**files, **asking, "answers_only": True}
