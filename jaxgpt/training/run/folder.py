"""The run folder: what a training leaves, and how others read it.

RUN/config.json      model, training and data; written once
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
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import lock, read_json, write_json
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
        or of the run's config.json); None for new parameters.
    """

    preset: str
    model: ModelConfig
    train: TrainConfig
    data: dict[str, Any]
    init: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        fields = {**dataclasses.asdict(self), "model": self.model.to_json()}
        return {"format_version": RUN_FORMAT_VERSION, **fields}


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
    if not folder.is_dir():
        raise UserError(f"run folder {folder} is missing; train one with: jaxgpt train PRESET --out {folder}")
    where = folder / "config.json"
    value = read_json(where, "run configuration")
    version = value.get("format_version")
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
        return RunConfig(value["preset"], model, train, data, init)


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; lines that are none (a kill cut the last one off) are left out."""
    path = folder / "metrics.jsonl"
    rows = []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


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
    require_same_training(folder, config)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.to_json())


def lock_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Return a context that holds a run folder; UserError when another process trains in it."""
    refusal = f"another process trains in {folder}; wait for it, or choose another --out"
    return lock(folder / ".lock", refusal)


# How often to look does not change what is trained.
_FREE_SETTINGS = {"eval_every", "checkpoint_every", "sample_every", "max_skipped"}


def _require_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    pairs = {
        **_differences("model", dataclasses.asdict(old.model), dataclasses.asdict(new.model)),
        **_differences("train", dataclasses.asdict(old.train), dataclasses.asdict(new.train)),
    }
    if old.data["manifest_sha256"] != new.data["manifest_sha256"]:
        pairs["data"] = (old.data["folder"], new.data["folder"])
    if _identity(old.init) != _identity(new.init):
        pairs["init"] = (_identity(old.init) or "none", _identity(new.init) or "none")
    if pairs:
        text = "; ".join(f"{name} was {was}, now {now}" for name, (was, now) in pairs.items())
        raise UserError(
            f"{folder} holds another training ({text}); choose another --out, or the old settings; to go on "
            f"from its model with new ones: --init {folder} --out ANOTHER"
        )


def _identity(init: dict[str, Any] | None) -> str:
    """Say what a run began with; a folder that was moved is the same."""
    if init is None:
        return ""
    step = "" if init["step"] is None else f" step {init['step']}"
    return f"{init['kind']} {init['sha256'][:12]}...{step}"


def _differences(section: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        f"{section}.{name}": (old[name], new[name])
        for name in old
        if old[name] != new[name] and name not in _FREE_SETTINGS
    }
