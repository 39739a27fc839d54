"""The run folder: what a training leaves, and how others read it.

RUN/config.json      model, training and data; written once, and again when that is changed (override.py)
RUN/checkpoints/     see checkpoints.py; RUN/damaged/ holds what could not be read
RUN/metrics.jsonl    a JSON object a line: step and loss, or step and val_loss
RUN/summary.json     figures of the finished run
RUN/tensorboard/  RUN/samples/  RUN/tokenizer/
RUN/.lock            held by the process that trains

This file imports no JAX: who reads a run's configuration or metrics need not have it.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import check_output_folder, read_json, write_json
from jaxgpt.shared.locks import lock
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

RUN_FORMAT_VERSION = 3
# Settings that format version 2 calls otherwise.
NAMES_IN_VERSION_2 = {
    "accumulate": "grad_accum_steps",
    "embedding_rate": "embedding_learning_rate",
    "final_rate": "final_lr_fraction",
    "cooldown": "lr_schedule",
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """config.json of a run.

    Attributes:
      preset: name it began from.
      model: shape.
      train: settings.
      data: folder, manifest hash, tokenizer name and hash.
      init: what it began with: folder, kind (run or artifact), step of the run, sha256 (of model.safetensors,
        or of the run's config.json) and, of a run, params_sha256 (of its parameters; runs of before have
        none); None for new parameters.
      overrides: what was changed on purpose, in order: step after which it holds, time (UTC), changed (name
        of a setting -> from, to), config_sha256 (of config.json before).
    """

    preset: str
    model: ModelConfig
    train: TrainConfig
    data: dict[str, Any]
    init: dict[str, Any] | None = None
    overrides: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds; nothing of overrides where there are none."""
        fields = {**dataclasses.asdict(self), "model": self.model.to_json()}
        found = {"format_version": RUN_FORMAT_VERSION, **fields}
        return found if self.overrides else {k: v for k, v in found.items() if k != "overrides"}

    def data_at(self, step: int) -> dict[str, Any]:
        """Return what `data` was in the steps up to one."""
        later = [each for each in self.overrides if each["step"] >= step and "data" in each["changed"]]
        found: dict[str, Any] = later[0]["changed"]["data"]["from"] if later else self.data
        return found

    def changed_since(self, step: int) -> set[str]:
        """Return the names of the settings that were changed after a step, or after a later one."""
        return {name for each in self.overrides if each["step"] >= step for name in each["changed"]}

    @property
    def data_since(self) -> int:
        """The step after which data set and eval_tokens are those of now: losses before are of other text."""
        changing = {"data", "train.eval_tokens"}
        return max((each["step"] for each in self.overrides if changing & each["changed"].keys()), default=0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that was opened.

    Attributes:
      folder: where it lies.
      config: its config.json.
      tokenizer: the one it was trained with.
    """

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer


def read_run_config(folder: Path) -> RunConfig:
    """Read a run's config.json; UserError when there is none or it is of another version."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a run folder; train one with: jaxgpt train")
    if not folder.is_dir():
        raise UserError(f"run folder {folder} is missing; train one with: jaxgpt train PRESET --out {folder}")
    where = folder / "config.json"
    value = read_json(where, "run configuration")
    version = value.get("format_version")
    if version is None and "model_type" in value:
        raise UserError(
            f"{folder} is an artifact or a Hugging Face model, as its config.json says; "
            "expected a run of `jaxgpt train`"
        )
    if version not in (2, RUN_FORMAT_VERSION):
        raise UserError(
            f"{where} has format version {version}, expected {RUN_FORMAT_VERSION} or 2; "
            "is it a run of `jaxgpt train`?"
        )
    with damaged(where, "take another run"):
        model = ModelConfig.from_json(value["model"], str(where))
        names = NAMES_IN_VERSION_2 if version == 2 else {}
        settings = {names.get(name, name): setting for name, setting in value["train"].items()}
        train = TrainConfig.from_json(settings, str(where))
        data = dict(value["data"])
        _ = data["folder"], data["manifest_sha256"], data["tokenizer"]["name"], data["tokenizer"]["sha256"]
        init = None if value.get("init") is None else dict(value["init"])
        _ = init is None or (init["folder"], init["kind"], init["step"], init["sha256"])
        overrides = tuple(dict(each) for each in value.get("overrides", []))
        for each in overrides:
            _ = int(each["step"]), dict(each["changed"]), each["config_sha256"]
        return RunConfig(value["preset"], model, train, data, init, overrides)


def open_run(folder: Path) -> Run:
    """Open a run folder.

    Raises:
      UserError: it is none, or its tokenizer is not the one that it was trained with.
    """
    config = read_run_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", str(config.data["tokenizer"]["name"]))
    if tokenizer.sha256 != config.data["tokenizer"]["sha256"]:
        raise UserError(
            f"tokenizer in {folder / 'tokenizer'} does not fit the checkpoint: it is "
            f"{tokenizer.sha256[:12]}..., the run was trained with "
            f"{config.data['tokenizer']['sha256'][:12]}..."
        )
    return Run(folder, config, tokenizer)


def data_entry(dataset: Dataset) -> dict[str, Any]:
    """Return what config.json says of the data."""
    return {
        "folder": str(dataset.folder.absolute()),
        "manifest_sha256": dataset.sha256,
        "tokenizer": dataset.manifest["tokenizer"],
    }


def check_tokenizer(config: RunConfig, dataset: Dataset) -> None:
    """Raise UserError unless a data set was made with the tokenizer of a run."""
    expected = config.data["tokenizer"]
    if dataset.tokenizer_sha256 != expected["sha256"]:
        theirs = dataset.manifest["tokenizer"]
        raise UserError(
            f"tokenizer of {dataset.folder} ({theirs['name']}, {theirs['sha256'][:12]}...) does not fit the "
            f"checkpoint ({expected['name']}, {expected['sha256'][:12]}...); give the data set of the run"
        )


def check_same_data(config: RunConfig, dataset: Dataset) -> None:
    """Raise UserError unless a data set is the one that a run was trained on, for whoever names no other.

    Another split of the same text would have validation documents that the run was trained on.
    """
    if dataset.sha256 != config.data["manifest_sha256"]:
        raise UserError(
            f"{dataset.folder} was prepared again since the run was trained, perhaps with another split; "
            f"name it (--data {dataset.folder}) to measure on it all the same"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; lines that are none (a kill cut the last one off) are left out."""
    path = folder / "metrics.jsonl"
    rows = []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def metrics_line(row: Mapping[str, Any]) -> str:
    """Return a row of metrics.jsonl; figures that are not finite, which JSON has not, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def require_same_training(folder: Path, config: RunConfig) -> None:
    """Check that a folder is free for a training, or holds the same one.

    Raises:
      UserError: it holds something else, or another training; the message names what differs.
    """
    if (folder / "config.json").exists():
        _require_same(read_run_config(folder), config, folder)
        return
    # A process killed while it made the folder leaves no more than these.
    begun = (".lock", ".config.json.tmp-")
    if folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(begun) for path in folder.iterdir())
    ):
        raise UserError(f"{folder} exists and is no run; choose another --out")


def create_run(folder: Path, config: RunConfig) -> None:
    """Make a run folder, or check that the one there is of the same training: see require_same_training."""
    check_output_folder(folder)
    require_same_training(folder, config)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.to_json())


def lock_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context that holds a run folder; UserError when another process trains in it."""
    refusal = f"another process trains in {folder}; wait for it, or choose another --out"
    return lock(folder / ".lock", refusal)


def stored_steps(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints by their folders' names, in order; they may be damaged."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


# How often to look does not change what is trained.
_FREE_SETTINGS = {"eval_every", "checkpoint_every", "sample_every", "max_skipped"}
Differences = dict[str, tuple[Any, Any]]  # name of a setting -> what it was, what it is now


def differences(old: RunConfig, new: RunConfig) -> Differences:
    """Return what differs between two trainings, but for how often they look, by name."""
    found: Differences = {}
    for section in ("model", "train"):
        was, now = (dataclasses.asdict(getattr(config, section)) for config in (old, new))
        for name in was:
            if was[name] != now[name] and name not in _FREE_SETTINGS:
                found[f"{section}.{name}"] = (was[name], now[name])
    if old.data["manifest_sha256"] != new.data["manifest_sha256"]:
        found["data"] = (old.data, new.data)
    told = all(init is not None and "params_sha256" in init for init in (old.init, new.init))
    before, after = _identity(old.init, told), _identity(new.init, told)
    if before != after:
        found["init"] = (before or "none", after or "none")
    return found


def in_words(found: Differences, *names: str) -> str:
    """Say what differs: of all, or of these names."""

    def shown(value: Any) -> str:
        return str(value["folder"]) if isinstance(value, dict) else str(value)

    chosen = {name: found[name] for name in names or found}
    return "; ".join(f"{name} was {shown(was)}, now {shown(now)}" for name, (was, now) in chosen.items())


def _require_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    found = differences(old, new)
    if found:
        raise UserError(
            f"{folder} holds another training ({in_words(found)}); choose another --out, or the old "
            "settings; to change this run from here on: --override (what is not given stays as it was); to "
            f"begin another with its model: --init {folder} --out ANOTHER"
        )


def _identity(init: dict[str, Any] | None, with_params: bool) -> str:
    """Say what a run began with; a folder that was moved is the same."""
    if init is None:
        return ""
    step = "" if init["step"] is None else f" step {init['step']}"
    params = f" with parameters {init['params_sha256'][:12]}..." if with_params else ""
    return f"{init['kind']} {init['sha256'][:12]}...{step}{params}"
