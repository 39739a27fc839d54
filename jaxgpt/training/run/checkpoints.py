"""Checkpoints of a run: parameters, optimizer, rng and position, saved whole by Orbax and read back checked.

RUN/checkpoints/STEP/    the two latest and the best stay
RUN/damaged/             checkpoints that could not be read or did not match their checksum, moved there
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.shared.console import say
from jaxgpt.shared.entry import leave
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json, write_json
from jaxgpt.training.devices.processes import (
    CommonError,
    all_agree,
    all_come,
    of_main_process,
    on_main_process,
)
from jaxgpt.training.model.params import Params, init_params, pad_vocabulary, trim_vocabulary
from jaxgpt.training.run.folder import Run
from jaxgpt.training.run.full_disk import told_as_os_error
from jaxgpt.training.step.state import Guard, TrainState

# Orbax reports each step of a save, and prints an error with its trace before it raises it.
logging.getLogger("absl").setLevel(logging.CRITICAL)


UNREADABLE_S = 60.0  # for other processes to tell that they can't read a checkpoint either


class Checkpoints:
    """Checkpoints of a run, saved in the background; the latest and the best by val_loss stay.

    Args:
      folder: the run folder.
      read_only: never writes nor deletes.
      data_since: the step after which val_loss is of the data set of now (RunConfig.data_since).

    Attributes:
      folder: that they lie in.
      val_losses: of the steps saved or found, nats per token; None where none was measured.
    """

    def __init__(self, folder: Path, read_only: bool = False, data_since: int = 0) -> None:
        self.data_since = data_since
        self._bytes = 0  # of a state
        # Two latest ones, should the last be damaged.
        policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(2), _Best(self)])
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
        # Orbax forgets them with the process. A step whose loss can't be read is not among them.
        self.val_losses: dict[int, float | None] = {}
        for step in self.steps():
            with contextlib.suppress(UserError):
                self.val_losses[step] = self._read_val_loss(step)

    def save(self, state: TrainState, position: dict[str, Any], val_loss: float | None) -> None:
        """Save a state in the background.

        Args:
          state: what a step changes.
          position: JSON values that belong to it (step, tokens seen, cpu seconds); val_loss is added.
          val_loss: nats per token measured at this very step; None when it was not.
        """
        rest = _beside_params(state)
        sums = {"checksum": checksum(state), "params_checksum": checksum(state.params)}
        position = {**position, "val_loss": val_loss, **sums}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(rest),
            position=ocp.args.JsonSave(position),
        )
        step = int(state.step)
        self.val_losses[step] = val_loss
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._full_disk_is_told():  # also of the save before this one
            saved = self._manager.save(step, args=args, force=True)
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step}")

    def steps(self) -> list[int]:
        """Return the steps that are stored whole, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the last stored step that process 0 sees; None when there is none."""
        return self._latest_before({})

    def best(self) -> int | None:
        """Return the stored step of lowest val_loss (the last one where none was measured).

        Losses on an earlier data set count where none was measured on that of now.
        """
        losses = {step: self.val_loss(step) for step in self.steps()}
        best = _of_main_process(_lowest(losses, self.data_since))
        return self.latest() if best is None else best

    def val_loss(self, step: int) -> float | None:
        """Return the val_loss stored with a step; None when it was not measured, or (said) can't be read."""
        if step not in self.val_losses:
            try:
                self.val_losses[step] = self._read_val_loss(step)
            except UserError as error:
                say(f"WARNING: the loss of checkpoint {step} does not count: {error}")
        return self.val_losses.get(step)

    def add_val_loss(self, step: int, val_loss: float) -> None:
        """Write the val_loss of a stored step down that was measured after it was saved."""
        if not math.isfinite(val_loss):
            return
        self.val_losses[step] = val_loss
        where = self._position_of(step)

        def write() -> None:
            write_json(where, {**read_json(where, "position of a checkpoint"), "val_loss": val_loss})

        on_main_process(write)

    def _position_of(self, step: int) -> Path:
        return self.folder / str(step) / "position" / "metadata"

    def _read_val_loss(self, step: int) -> float | None:
        """Read the val_loss of a step as it lies there; no process waits for another."""
        where = self._position_of(step)
        value = read_json(where, "position of a checkpoint").get("val_loss")
        with damaged(where, "another step may be whole"):
            return None if value is None else float(value)

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
            float(position["cpu_seconds"]), int(position.get("tokens_seen", 0))
        if not whole:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged: its arrays do not have the checksum that "
                f"they were saved with; stored steps: {self.steps()}"
            )
        return state, position

    def restore_latest_whole(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read the last checkpoint that is whole; damaged ones after it go to RUN/damaged, with a warning.

        Nothing is moved before an earlier one was read: where none can be, the fault may lie elsewhere.

        Raises:
          UserError: none is whole.
        """
        failed: dict[int, str] = {}
        while (step := self._latest_before(failed)) is not None:
            found, reason = None, ""
            try:
                found = self.restore(step, abstract)
            except UserError as error:
                reason = str(error)
            if all_agree(found is not None):
                assert found is not None
                self._set_aside(failed)
                return found
            failed[step] = reason or f"another process can not read {self.folder / str(step)}"
        first = next(iter(failed.values()), "there is none")
        raise CommonError(
            f"no checkpoint in {self.folder} is whole: {first}; none was moved; mend what is named here "
            "(memory, file system, other versions), or begin anew with another --out"
        )

    def _latest_before(self, failed: Mapping[int, str]) -> int | None:
        """Return the last stored step but those that failed."""
        return _of_main_process(max((each for each in self.steps() if each not in failed), default=None))

    def _set_aside(self, failed: Mapping[int, str]) -> None:
        """Move checkpoints that could not be read to RUN/damaged, in process 0."""
        for step, reason in failed.items():
            on_main_process(functools.partial(self._move, step))
            say(f"WARNING: {reason}")
            say(f"WARNING: checkpoint {step} is moved to {self.folder.parent / 'damaged'}")
        if failed:
            self._manager.reload()

    def _move(self, step: int) -> None:
        target = self.folder.parent / "damaged" / f"{step}-{int(time.time())}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(target)

    def restore_params(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """Read the parameters alone.

        Raises:
          UserError: they can't be read, or are damaged; those of earlier versions have no checksum.
        """
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        params: Params = self._restore(step, args)["params"]
        stored = read_json(self._position_of(step), "position of a checkpoint").get("params_checksum")
        if stored is not None and stored != checksum(params):
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged: its parameters do not have the checksum "
                f"that they were saved with; take another step, of {self.steps()}"
            )
        return params

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            text = f"checkpoint {self.folder / str(step)} can't be read ({type(error).__name__}: {line}); "
            # Where some could read it, they wait for this one in Orbax's barrier.
            if not all_come(f"unreadable {step}", UNREADABLE_S):
                leave(
                    f"error: {text}the other processes end too; mend what is named here, or move it away to "
                    "go on from an earlier one",
                    code=2,
                )
            raise UserError(f"{text}stored steps: {self.steps()}") from error

    def wait(self) -> None:
        """Wait for the saves under way.

        Raises:
          OSError: the disk is full; what was saved before is whole.
        """
        with self._full_disk_is_told():
            self._manager.wait_until_finished()

    def raise_failed_save(self) -> None:
        """Raise what `wait` would, where the last save has ended; waits for none."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _full_disk_is_told(self) -> contextlib.AbstractContextManager[None]:
        return told_as_os_error(self.folder, f"a checkpoint of {self._bytes:,} bytes")

    def close(self) -> None:
        """Stop, after the saves under way."""
        with contextlib.suppress(Exception):  # wait() is where a failed save is told
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()


def checksum(state: TrainState | Params) -> int:
    """Return a sum over all bits of a state, or of parameters; any single bit changes it, and the order.

    Integer arithmetic: the same for every layout over devices.
    """
    # Leaf by leaf, so that the many leaves of equal shape share a compiled program, and one after the other,
    # for processes that meet in several programs at once may wait for each other without end.
    sums = [jax.device_get(_sums(leaf)) for leaf in jax.tree.leaves(state)]
    total = sum(int(weighted) + 2 * number * int(plain) for number, (weighted, plain) in enumerate(sums))
    return total % 2**32


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sums of an array's bits times odd weights that tell their place, and of the bits alone.

    Odd, with any even number added: a changed bit 2^k moves the sum by an odd multiple of 2^k, never by 0.
    """
    size = leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(1_000_003) + index
    weights = place * jnp.uint32(2) + jnp.uint32(1)
    words = bits.astype(jnp.uint32)
    return jnp.sum(words * weights, dtype=jnp.uint32), jnp.sum(words, dtype=jnp.uint32)


def _beside_params(state: TrainState) -> dict[str, Any]:
    rest = state._asdict()
    del rest["params"]
    return {**rest, "guard": state.guard._asdict()}


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the best checkpoint, the one that Checkpoints.best names."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return which checkpoints stay, of those that Orbax knows."""
        losses = self._checkpoints.val_losses
        here = {each.step: losses[each.step] for each in checkpoints if each.step in losses}
        best = _lowest(here, self._checkpoints.data_since)
        return [each.step == best or each.step not in losses for each in checkpoints]


def _of_main_process(step: int | None) -> int | None:
    """Return process 0's step in every process, for all read the same one together."""
    found = of_main_process(-1 if step is None else step)
    return None if found < 0 else found


def _lowest(losses: Mapping[int, float | None], data_since: int) -> int | None:
    """Return the step of the lowest loss, of those after data_since if there are any; None without losses."""
    known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    known = {step: loss for step, loss in known.items() if step > data_since} or known
    return min(known, key=lambda step: known[step]) if known else None


def load_params(run: Run, which: str) -> tuple[int, Params]:
    """Read a run's parameters for use on one device, the token table without padding.

    Args:
      run: an opened run.
      which: "best", "latest" or a step.

    Returns:
      The step and the parameters.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    model, multiple = run.config.model, run.config.train.vocab_multiple
    abstract = jax.eval_shape(lambda: pad_vocabulary(init_params(model, 0), multiple))
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for name, leaf in abstract.items()
    }
    checkpoints = Checkpoints(run.folder, read_only=True, data_since=run.config.data_since)
    try:
        step = checkpoints.resolve(which)
        return step, trim_vocabulary(checkpoints.restore_params(step, placed), model.vocab_size)
    finally:
        checkpoints.close()
