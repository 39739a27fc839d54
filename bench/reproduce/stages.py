"""The stages of a reproduction: each is kept where its output fits what it would be made from.

Nothing beside the outputs says what is done: a data set has its manifest, a run its configuration and
summary, an artifact its certificate with the hash of its parent, a measurement the hashes of the models that
it was made from. So a folder that the single commands filled is taken over, and one that was changed is
noticed. Each output appears under its name when it is whole.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from bench.reproduce.recipes import HUB_SOURCE, Recipe
from export.certificate import VerifyOptions, altered_files, read_certificate, verify
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, sha256_of, write_json
from jaxgpt.tokens import Dataset, open_dataset

# Row of the tables (and folder), method of `jaxgpt-export quantize`, the folder it is made from.
QUANTIZED = (
    ("int8-dynamic", "dynamic", "fp32"),
    ("int8-static", "static", "fp32"),
    ("int8-static-qat", "static-qat", "fp32-qat"),
    ("int8-weight-only", "weight-only-int8", "fp32"),
    ("int4-weight-only", "weight-only-int4", "fp32"),
)


class StoppedError(Exception):
    """A stage did not come to its end: a check failed, or a training was asked to stop."""

    def __init__(self, figures: dict[str, Any], passed: bool) -> None:
        super().__init__()
        self.result = Result(figures, passed)


@dataclasses.dataclass
class Stages:
    """What was done and what was kept.

    Attributes:
      redo: stages that are done again even where their output fits.
      log: name, kept (or done), and the seconds that it took.
    """

    redo: Sequence[str] = ()
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def kept(self, name: str, why: str) -> None:
        """Note that a stage is skipped."""
        say(f"[{name}] kept: {why}")
        self.log.append({"stage": name, "kept": True, "seconds": 0.0})

    @contextlib.contextmanager
    def doing(self, name: str, what: str) -> Iterator[None]:
        """Note that a stage is done in this block."""
        say(f"[{name}] {what}")
        started = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - started, 1)
        say(f"[{name}] done in {seconds:,.0f} s")
        self.log.append({"stage": name, "kept": False, "seconds": seconds})

    def measured(
        self,
        path: Path,
        made_from: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
        group: str | None = None,
    ) -> dict[str, Any]:
        """Return a JSON file's figures, measured anew unless it was made from the same.

        Args:
          path: the file; its stem names the stage.
          made_from: settings and hashes of the inputs.
          measure: gives the figures.
          group: the name in `redo`, where it is not the stem.
        """
        name, made_from = path.stem, json.loads(json.dumps(made_from))
        if (group or name) not in self.redo and path.exists():
            try:
                found = read_json(path, "figures")
            except UserError:  # damaged: measured again
                found = {}
            if found.get("made_from") == made_from:
                self.kept(name, f"{path} was measured on these models with these settings")
                return found
            say(f"[{name}] {path} was made from something else")
        with self.doing(name, "measuring"):
            figures = {**measure(), "made_from": made_from}
            write_json(path, figures)
        return figures


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
            f"so the text is {recipe.offline_source} instead, which is NOT the original's data"
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

        with stages.doing("data", f"preparing {source}"):
            prepare(PrepareOptions(folder, source, recipe.tokenizer, recipe.val_fraction))
        return open_dataset(folder)
    dataset = open_dataset(folder)
    manifest = dataset.manifest
    asked = {"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction}
    there = {
        "tokenizer": manifest["tokenizer"]["name"],
        "val_fraction": manifest.get("split", {}).get("val_fraction"),
    }
    if wanted != "auto":
        asked["source"], there["source"] = choose_source(wanted, recipe), manifest.get("source")
    if different := [
        f"{key} was {there[key]}, now {asked[key]}" for key in asked if asked[key] != there[key]
    ]:
        raise UserError(
            f"{folder} was prepared otherwise ({'; '.join(different)}); "
            "choose another --out, or the settings that were"
        )
    stages.kept("data", f"{folder} holds {manifest.get('source')}, hashes fit")
    return dataset


def trained(stages: Stages, name: str, out: Path, settings: dict[str, Any], dataset: Dataset) -> Path:
    """Return a finished run, trained (or trained on) where it is not finished.

    Args:
      stages: where it is noted.
      name: of the stage.
      out: the run folder.
      settings: other options of `jaxgpt train`.
      dataset: what it is trained on.

    Raises:
      UserError: the folder holds another training.
      StoppedError: the training was asked to stop, or failed.
    """
    from jaxgpt.options import TrainOptions
    from jaxgpt.train import train

    options = TrainOptions(data=dataset.folder, out=out, **settings)
    if is_finished(options, dataset):
        stages.kept(name, f"{out} is this training, finished")
        return out
    with stages.doing(name, f"training in {out}"):
        result = train(options)
        if "stopped" in result.figures or not result.passed:
            raise StoppedError({"stage": name, **result.figures}, result.passed)
    return out


def is_finished(options: Any, dataset: Dataset) -> bool:
    """Tell whether a run folder holds the finished training of these options; nothing is written.

    Raises:
      UserError: it holds another training.
    """
    from jaxgpt.initial import open_initial
    from jaxgpt.options import run_config, with_precision
    from jaxgpt.runs import require_claimable

    if not (options.out / "summary.json").exists():
        return False
    initial = None if options.init is None else open_initial(options.init)
    config = run_config(options, dataset, initial)
    if options.precision is None:
        config = with_precision(config, options.out)
    if initial is not None:
        config = dataclasses.replace(config, init=initial.read(config.model)[1])
    require_claimable(options.out, config)
    summary = read_json(options.out / "summary.json", "summary of a run")
    return summary.get("steps") == config.train.max_steps


def best_step(run: Path) -> int:
    """Return the step of a run's best checkpoint."""
    from jaxgpt.checkpoints import load_params
    from jaxgpt.runs import open_run

    return load_params(open_run(run), "best")[0]


def converted(stages: Stages, out: Path, run: Path, dataset: Dataset) -> Path:
    """Return the float32 artifact of a run, converted where there is none that fits.

    Raises:
      StoppedError: it is too far from the run.
    """
    expected = {
        "run_config_sha256": sha256_of(run / "config.json"),
        "step": best_step(run),
        "manifest_sha256": dataset.sha256,
    }

    def fits(certificate: dict[str, Any]) -> bool:
        origin = certificate["origin"]
        found = {**origin, "manifest_sha256": origin.get("data", {}).get("manifest_sha256")}
        return certificate["kind"] == "fp32" and all(found.get(key) == expected[key] for key in expected)

    if _is_kept(stages, "convert", out, fits):
        return out
    from export.convert import ConvertOptions, convert

    with stages.doing("convert", f"{run} -> {out}"):
        _require(convert(ConvertOptions(run, out, data=dataset.folder, overwrite=True)), "convert")
        _require(verify(VerifyOptions(out, run)), "convert")
    return out


def quantized(stages: Stages, out: Path, method: str, parent: Path, dataset: Dataset) -> Path:
    """Return the artifact of a method, quantized where there is none that fits.

    Raises:
      StoppedError: it does not hold what its certificate says.
    """
    parent_sha256 = sha256_of(parent / "model.safetensors")

    def fits(certificate: dict[str, Any]) -> bool:
        return (
            certificate.get("method") == method
            and certificate["origin"].get("parent_sha256") == parent_sha256
            and "quality" in certificate  # it was given data
            and certificate.get("calibration", {}).get("observer") != "nearest"
        )

    if _is_kept(stages, "quantize", out, fits):
        return out
    from export.quantize.command import QuantizeOptions, quantize

    with stages.doing("quantize", f"{parent} -> {out}"):
        _require(
            quantize(QuantizeOptions(parent, cast(Any, method), out, dataset.folder, overwrite=True)),
            "quantize",
        )
        _require(verify(VerifyOptions(out)), "quantize")
    return out


def _is_kept(stages: Stages, name: str, out: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Tell whether an artifact is kept: its certificate is whole, fits, and so do its files' hashes."""
    if not out.exists() or name in stages.redo:
        return False
    try:
        certificate = read_certificate(out)
        why = "is of another model or setting" if not fits(certificate) else ""
        if not why and (altered := altered_files(out, certificate)):
            why = f"was altered ({', '.join(altered)})"
    except UserError as error:
        why = f"can't be read ({error})"
    if why:
        say(f"[{name}] {out} {why}")
        return False
    stages.kept(name, f"{out}, its certificate and hashes fit")
    return True


def _require(result: Result, stage: str) -> None:
    if not result.passed:
        raise StoppedError({"stage": stage, **result.figures}, passed=False)
