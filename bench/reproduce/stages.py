"""The stages of a reproduction: each is kept where its output fits what it would be made from.

Nothing beside the outputs says what is done: a data set has its manifest, a run its configuration and
summary, an artifact its certificate with the hash of its parent, a measurement the hashes of the models that
it was made from. So a folder that the single commands filled is taken over, and one that was changed is
noticed. Each output appears under its name when it is whole.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from bench.machine import provenance
from bench.reproduce.recipes import HUB_SOURCE, Recipe
from export.certificate import VerifyOptions, altered_files, read_certificate, verify
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, read_json, sha256_of, write_json
from jaxgpt.tokens import Dataset, open_dataset

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
MADE = ("date", "commit", "seconds")
FIGURES_VERSION = 2  # of the measurements' files: those of another are measured anew
DIFFERENCES_SHOWN = 3


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
      log: name, kept (or done), the seconds that it took now, and `made`: date, commit and seconds of when
        it was really made, each None where nothing in the output tells it.
    """

    redo: Sequence[str] = ()
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def kept(self, name: str, why: str, made: Mapping[str, Any]) -> None:
        """Note that a stage is skipped; `made` is what its output says of when it was made."""
        say(f"[{name}] kept: {why}")
        entry = {"stage": name, "kept": True, "seconds": 0.0}
        self.log.append({**entry, "made": {key: made.get(key) for key in MADE}})

    @contextlib.contextmanager
    def doing(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Note that a stage is done in this block; gives its `made`, filled when the block ends."""
        say(f"[{name}] {what}")
        started = time.perf_counter()
        made: dict[str, Any] = {}
        yield made
        seconds = round(time.perf_counter() - started, 1)
        say(f"[{name}] done in {seconds:,.0f} s")
        now = provenance()
        made |= {"date": now["date"], "commit": now["commit"], "seconds": seconds}
        self.log.append({"stage": name, "kept": False, "seconds": seconds, "made": made})

    def earlier(self, path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """Return a JSON file's figures where they were made from the same, else None and a line why.

        Args:
          path: the file; its stem names the stage.
          made_from: settings and hashes of the inputs.
        """
        if not path.exists():
            return None
        found = read_figures(path)
        if not found:
            say(f"[{path.stem}] {path} is damaged")
            return None
        was, now = found.get("made_from", {}), _made_from(made_from)
        if was == now:
            self.kept(path.stem, f"{path} was measured on these models with these settings", found["made"])
            return found
        say(f"[{path.stem}] {path} was made from something else: {_differing(was, now)}")
        return None

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
        if (group or path.stem) not in self.redo:
            found = self.earlier(path, made_from)
            if found is not None:
                return found
        with self.doing(path.stem, "measuring") as made:
            figures = measure()
        figures = {**figures, "made": made, "made_from": _made_from(made_from)}
        write_json(path, figures)
        return figures


def read_figures(path: Path) -> dict[str, Any]:
    """Return a measurement's file; nothing where it is damaged: it is measured again."""
    try:
        return read_json(path, "figures")
    except UserError:
        return {}


def _made_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs as they are read back from JSON, with the version of the figures."""
    found: dict[str, Any] = json.loads(json.dumps({"figures_version": FIGURES_VERSION, **inputs}))
    return found


def _differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what differs, with both values."""
    keys = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    shown = [f"{key} {_short(was.get(key))} -> {_short(now.get(key))}" for key in keys[:DIFFERENCES_SHOWN]]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


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
    from jaxgpt.options import TrainOptions
    from jaxgpt.runs import read_run_config
    from jaxgpt.train import train

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
    from jaxgpt.runs import read_metrics

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
    from jaxgpt.progress import RATE_STEPS

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
    return read_summary(options.out).get("steps") == config.train.max_steps


def best_step(run: Path) -> int:
    """Return the step of a run's best checkpoint."""
    from jaxgpt.checkpoints import Checkpoints

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
    stages.kept(name, f"{out}, its certificate and hashes fit", certificate)
    return True


def _require(result: Result, stage: str) -> None:
    if not result.passed:
        raise StoppedError({"stage": stage, **result.figures}, passed=False)
