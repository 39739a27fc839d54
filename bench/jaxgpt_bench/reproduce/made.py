"""The outputs of a reproduction's stages, made where there are none that fit."""

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxgpt_export.format.certificate import altered_files, read_certificate
from jaxgpt_export.verify import VerifyOptions, verify

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, read_json, sha256_of
from jaxgpt_bench.reproduce.recipes import HUB_SOURCE, Recipe
from jaxgpt_bench.reproduce.stages import Stages, read_figures

# Row of the tables (and folder), method of `jaxgpt-export quantize`, the folder it is made from.
QUANTIZED = (
    ("int8-dynamic", "dynamic", "fp32"),
    ("int8-static", "static", "fp32"),
    ("int8-static-qat", "static-qat", "fp32-qat"),
    ("int8-weight-only", "weight-only-int8", "fp32"),
    ("int4-weight-only", "weight-only-int4", "fp32"),
)
# What tells an output folder that is filled by and by; the others appear whole, with a certificate.
MARKERS = {"data": "manifest.json", "run": "config.json", "qat": "config.json"}


class StoppedError(Exception):
    """A stage did not come to its end: a check failed, or a training was asked to stop."""

    def __init__(self, figures: dict[str, Any], passed: bool) -> None:
        super().__init__()
        self.result = Result(figures, passed)


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
    for name in ("fp32", "fp32-qat", *(name for name, _, _ in QUANTIZED)):
        check_replaceable(out / name, True, "certificate.json")


@contextlib.contextmanager
def _made_by_removing(folder: Path) -> Iterator[None]:
    """Say what makes a damaged folder anew: what the single commands advise is no option here."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (here: remove {folder}, and the same command makes it anew)") from None


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
    with _made_by_removing(folder):
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
    stages.kept("data", f"{folder} holds {manifest.get('source')}, hashes fit", manifest)
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
      UserError: the folder holds another training, or is damaged.
      StoppedError: the training was asked to stop, or failed.
    """
    from jaxgpt.training.options import TrainOptions
    from jaxgpt.training.run.folder import read_run_config
    from jaxgpt.training.train import train

    options = TrainOptions(data=dataset.folder, out=out, **settings)
    if (out / "config.json").exists():
        with _made_by_removing(out):
            read_run_config(out)
    if is_finished(options, dataset):
        stages.kept(name, f"{out} is this training, finished", made_of_run(out))
        return out
    with stages.doing(name, f"training in {out}") as made:
        result = train(options)
        if "stopped" in result.figures or not result.passed:
            raise StoppedError({"stage": name, **result.figures}, result.passed)
        read_summary(out)
    made["seconds"] = made_of_run(out)["seconds"]  # of all its steps: this call may have done the last ones
    return out


def read_summary(run: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Raises:
      UserError: it is missing or damaged. A training writes it after its last step, so that is done again.
    """
    try:
        return read_json(run / "summary.json", "summary of a finished run")
    except UserError:
        steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
        last = run / "checkpoints" / str(max(steps, default="*"))
        raise UserError(
            f"{run / 'summary.json'} is missing or damaged, though its run is done; remove it and {last}; "
            "the same command then trains the last steps again and writes it"
        ) from None


def made_of_run(run: Path) -> dict[str, Any]:
    """Return when a run was made: date of its last checkpoint, seconds of its steps.

    Compilation, validations and samples are not in the seconds. A run does not tell its commit.
    """
    from jaxgpt.training.run.folder import read_metrics

    seconds = seconds_of_steps(read_metrics(run))
    files = (run / "checkpoints").glob("*/_CHECKPOINT_METADATA")  # Orbax's
    saved = [read_figures(path).get("commit_timestamp_nsecs") or 0 for path in files]
    last = max(saved, default=0) / 1e9
    date = datetime.datetime.fromtimestamp(last, datetime.UTC).isoformat(timespec="seconds") if last else None
    return {"date": date, "seconds": round(seconds, 1) if seconds else None}


def seconds_of_steps(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Add up the time between the steps of metrics.jsonl.

    step_ms is a mean over the last RATE_STEPS steps, or over those since the last pause, which begins with a
    step that has none: so the last means of a stretch, one every RATE_STEPS, are the whole of it.
    """
    from jaxgpt.training.run.recorder import RATE_STEPS

    stretches: list[list[float]] = [[]]
    for row in metrics:
        if "step_ms" in row:
            stretches[-1].append(row["step_ms"])
        elif "loss" in row:
            stretches.append([])
    return math.fsum(
        means[end - 1] * min(end, RATE_STEPS) / 1e3
        for means in stretches
        for end in range(len(means), 0, -RATE_STEPS)
    )


def is_finished(options: Any, dataset: Dataset) -> bool:
    """Tell whether a run folder holds the finished training of these options; nothing is written.

    Raises:
      UserError: it holds another training, or its summary is damaged.
    """
    from jaxgpt.training.options import run_config, with_precision
    from jaxgpt.training.run.folder import require_same_training
    from jaxgpt.training.run.init_from import open_init_source

    if not (options.out / "summary.json").exists():
        return False
    initial = None if options.init is None else open_init_source(options.init)
    config = run_config(options, dataset, initial)
    if options.precision is None:
        config = with_precision(config, options.out)
    if initial is not None:
        config = dataclasses.replace(config, init=initial.read(config.model)[1])
    require_same_training(options.out, config)
    return read_summary(options.out).get("steps") == config.train.max_steps


def best_step(run: Path) -> int:
    """Return the step of a run's best checkpoint."""
    from jaxgpt.training.run.checkpoints import Checkpoints

    checkpoints = Checkpoints(run, read_only=True)
    try:
        return checkpoints.resolve("best")
    finally:
        checkpoints.close()


def weights_sha256(artifact: Path) -> str:
    """Return the hash of an artifact's weights from its certificate, with which its files were compared."""
    return str(read_certificate(artifact)["files"]["model.safetensors"])


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
    from jaxgpt_export.convert import ConvertOptions, convert

    with stages.doing("convert", f"{run} -> {out}"):
        _require(convert(ConvertOptions(run, out, data=dataset.folder, overwrite=True)), "convert")
        _require(verify(VerifyOptions(out, run)), "convert")
    return out


def quantized(stages: Stages, out: Path, method: str, parent: Path, dataset: Dataset) -> Path:
    """Return the artifact of a method, quantized where there is none that fits.

    Raises:
      StoppedError: it does not hold what its certificate says.
    """
    parent_sha256 = weights_sha256(parent)

    def fits(certificate: dict[str, Any]) -> bool:
        return (
            certificate.get("method") == method
            and certificate["origin"].get("parent_sha256") == parent_sha256
            and "quality" in certificate  # it was given data
            and certificate.get("calibration", {}).get("observer") != "nearest"
        )

    if _is_kept(stages, "quantize", out, fits):
        return out
    from jaxgpt_export.quantize.command import QuantizeOptions, quantize

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
    stages.kept(name, f"{out}, its certificate and hashes fit", certificate)
    return True


def _require(result: Result, stage: str) -> None:
    if not result.passed:
        raise StoppedError({"stage": stage, **result.figures}, passed=False)
