"""The run folder: what a training leaves, and how others read it.

RUN/config.json      model, training and data; written once
RUN/checkpoints/     Orbax: parameters, optimizer, rng, position; the latest and the best are kept
RUN/metrics.jsonl    a JSON object a line: step and loss, or step and val_loss
RUN/summary.json     figures of the finished run
RUN/tensorboard/  RUN/samples/  RUN/tokenizer/
RUN/damaged/         checkpoints that could not be read or did not match their checksum, moved there
RUN/.lock            held by the process that trains
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.config import RUN_FORMAT_VERSION, ModelConfig, TrainConfig
from jaxgpt.model import Params, abstract_params
from jaxgpt.processes import all_agree, first_does
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json, write_json
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.steps import Guard, TrainState
from jaxgpt.tokens import Dataset

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each step of a save


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """config.json of a run.

    Attributes:
      preset: name it began from.
      model: shape.
      train: settings.
      data: folder, manifest hash, tokenizer name and hash.
    """

    preset: str
    model: ModelConfig
    train: TrainConfig
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"format_version": RUN_FORMAT_VERSION, **dataclasses.asdict(self)}


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
    if value.get("format_version") != RUN_FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {value.get('format_version')}, expected {RUN_FORMAT_VERSION}; "
            "is it a run of `jaxgpt train`?"
        )
    with damaged(where, "take another run"):
        model = ModelConfig.from_json(value["model"], str(where))
        train = TrainConfig.from_json(value["train"], str(where))
        data = dict(value["data"])
        _ = data["folder"], data["manifest_sha256"], data["tokenizer"]["name"], data["tokenizer"]["sha256"]
        return RunConfig(value["preset"], model, train, data)


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


class Checkpoints:
    """Checkpoints of a run, saved in the background; the latest and the best by val_loss stay.

    Args:
      folder: the run folder.
      read_only: never writes nor deletes.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(2),  # one more, should the last be damaged
                preservation_policy.BestN(get_metric_fn=_badness, reverse=True, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.folder = folder / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise UserError(f"{folder} holds no checkpoints; train it first")
        names = ("params", "opt_state", "position")
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_names=names)

    def save(self, state: TrainState, position: dict[str, Any], val_loss: float | None) -> None:
        """Save a state in the background.

        Args:
          state: what a step changes.
          position: JSON values that belong to it (step, tokens seen, cpu seconds); val_loss is added.
          val_loss: nats per token measured at this very step; None when it was not.
        """
        rest = _beside_params(state)
        position = {**position, "val_loss": val_loss, "checksum": checksum(state)}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(rest),
            position=ocp.args.JsonSave(position),
        )
        metrics = {"val_loss": math.inf if val_loss is None else val_loss}
        with _full_disk_is_an_os_error(self.folder):  # also of the save before this one
            saved = self._manager.save(int(state.step), args=args, metrics=metrics, force=True)
        if not saved:
            raise RuntimeError(f"Orbax did not save step {int(state.step)}")

    def steps(self) -> list[int]:
        """Return the steps that are stored whole, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the last stored step; None when there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """Return the stored step of lowest val_loss (the last one where none was measured)."""
        losses = {step: self.val_loss(step) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=lambda step: known[step]) if known else self.latest()

    def val_loss(self, step: int) -> float | None:
        """Return the val_loss stored with a step; None when it was not measured."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        value: float | None = self._restore(step, args)["position"]["val_loss"]
        return value

    def resolve(self, which: str) -> int:
        """Turn "best", "latest" or a number into a stored step; UserError when it is not there."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train the run first")
        if which in ("best", "latest"):
            chosen = self.best() if which == "best" else self.latest()
            assert chosen is not None
            return chosen
        if not (which.isascii() and which.isdigit()) or int(which) not in steps:
            raise UserError(f"step {which!r} is not stored; expected best, latest or one of {steps}")
        return int(which)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read a whole state.

        Args:
          step: a stored one.
          abstract: shapes, dtypes and shardings to read into.

        Returns:
          The state and its position.

        Raises:
          UserError: it can't be read, or is not what was saved.
        """
        rest = _beside_params(abstract)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(rest),
            position=ocp.args.JsonRestore(),
        )
        found = self._restore(step, args)
        rest = found["opt_state"]
        guard = Guard(**rest.pop("guard"))
        state, position = TrainState(params=found["params"], guard=guard, **rest), dict(found["position"])
        with damaged(self.folder / str(step) / "position", "an earlier step may be whole"):
            whole = position["checksum"] == checksum(state) and position["step"] == step
            float(position["cpu_seconds"])
        if not whole:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged: its arrays do not have the checksum that "
                f"they were saved with; stored steps: {self.steps()}"
            )
        return state, position

    def restore_latest_whole(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read the last checkpoint that is whole; damaged ones are moved to RUN/damaged, loudly.

        Raises:
          UserError: none is.
        """
        while (step := self.latest()) is not None:
            found, reason = None, ""
            try:
                found = self.restore(step, abstract)
            except UserError as error:
                reason = str(error)
            if all_agree(found is not None):
                assert found is not None
                return found
            first_does(functools.partial(self._set_aside, step))
            say(f"WARNING: {reason or 'another process can not read it'}")
            say(f"WARNING: checkpoint {step} is moved to {self.folder.parent / 'damaged'}")
            self._manager.reload()
        raise UserError(f"no checkpoint in {self.folder} is whole; start anew with another --out")

    def _set_aside(self, step: int) -> None:
        target = self.folder.parent / "damaged" / f"{step}-{int(time.time())}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(target)

    def restore_params(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """Read the parameters alone."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        params: Params = self._restore(step, args)["params"]
        return params

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            raise UserError(
                f"checkpoint {self.folder / str(step)} can't be read ({type(error).__name__}: {line}); "
                f"stored steps: {self.steps()}"
            ) from error

    def wait(self) -> None:
        """Wait for the saves under way.

        Raises:
          OSError: the disk is full; what was saved before is whole.
        """
        with _full_disk_is_an_os_error(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Stop, after the saves under way."""
        with contextlib.suppress(Exception):  # wait() is where a failed save is told
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()


@contextlib.contextmanager
def _full_disk_is_an_os_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap it in several kinds
        if "No space left" not in str(error) and "ENOSPC" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space left", str(folder)) from error


def checksum(state: TrainState) -> int:
    """Return a sum over all bits of a state; it changes with any single bit, and with the order.

    Integer arithmetic: the same for every layout over devices.
    """
    return int(_checksum(state))


@jax.jit
def _checksum(state: TrainState) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        size = leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(1_000_003) + index
        # odd weights: a changed bit 2^k moves the sum by an odd multiple of 2^k, never by 0
        weights = (place + jnp.uint32(number)) * jnp.uint32(2) + jnp.uint32(1)
        total += jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)
    return total


def _beside_params(state: TrainState) -> dict[str, Any]:
    rest = state._asdict()
    del rest["params"]
    return {**rest, "guard": state.guard._asdict()}


def _badness(metrics: dict[str, float]) -> float:
    return float(metrics.get("val_loss", math.inf))


def load_params(run: Run, which: str) -> tuple[int, Params]:
    """Read a run's parameters for use on one device.

    Args:
      run: an opened run.
      which: "best", "latest" or a step.

    Returns:
      The step and the parameters.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in abstract_params(run.config.model).items()
    }
    checkpoints = Checkpoints(run.folder, read_only=True)
    try:
        step = checkpoints.resolve(which)
        return step, checkpoints.restore_params(step, placed)
    finally:
        checkpoints.close()


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


def claim_run(folder: Path, config: RunConfig) -> None:
    """Make a run folder, or check that the one there is of the same training.

    Raises:
      UserError: the folder holds something else, or another training; the message names what differs.
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
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_json())


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold a run folder; it is freed when the process ends, however it does.

    Raises:
      UserError: another process trains in it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process trains in {folder}; wait for it, or choose another --out"
            ) from None
        yield


# How often to look does not change what is trained.
_FREE_SETTINGS = {"eval_every", "checkpoint_every", "sample_every", "max_skipped"}


def _require_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    pairs = {
        **_differences("model", dataclasses.asdict(old.model), dataclasses.asdict(new.model)),
        **_differences("train", dataclasses.asdict(old.train), dataclasses.asdict(new.train)),
    }
    if old.data["manifest_sha256"] != new.data["manifest_sha256"]:
        pairs["data"] = (old.data["folder"], new.data["folder"])
    if pairs:
        text = "; ".join(f"{name} was {was}, now {now}" for name, (was, now) in pairs.items())
        raise UserError(
            f"{folder} holds another training ({text}); choose another --out, or the old settings"
        )


def _differences(section: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        f"{section}.{name}": (old[name], new[name])
        for name in old
        if old[name] != new[name] and name not in _FREE_SETTINGS
    }
