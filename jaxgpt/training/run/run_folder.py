"""A run folder while it is trained in: locked, begun or resumed, its checkpoints and metrics written.

    with jaxgpt.RunFolder(Path("runs/mine"), training) as run:
        state = run.begin_or_resume()
        for step in range(int(state.step) + 1, training.train.max_steps + 1):
            state, metrics = training.step(state, training.batch(step))
            run.record(step, metrics)
            if step % 100 == 0:
                run.save(state, run.validate(state))

folder.py says what lies in it, and reads it.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.console import cpu_seconds, say
from jaxgpt.shared.errors import UserError, require_type
from jaxgpt.shared.files import as_path
from jaxgpt.training.devices.precision import peak_flops
from jaxgpt.training.devices.processes import is_main_process, of_main_process, on_main_process
from jaxgpt.training.run.checkpoints import Checkpoints
from jaxgpt.training.run.folder import (
    Differences,
    create_run,
    in_words,
    lock_run,
    read_metrics,
    read_run_config,
)
from jaxgpt.training.run.full_disk import quiet_threads
from jaxgpt.training.run.learning_rates import LearningRates
from jaxgpt.training.run.override import CHANGING_LOSSES, adapted, changes, record
from jaxgpt.training.run.recorder import Recorder, make_recorder
from jaxgpt.training.run.training import Training
from jaxgpt.training.step.state import TrainState


class RunFolder:
    """A run folder that is open for a training, made if it is not there; nobody else can train in it.

    Args:
      folder: where; what lies there must be the same training (intervals may differ).
      training: what is trained.
      override: what lies there is another training, which is changed to this one from its last checkpoint on;
        override.py says what may change.

    Attributes:
      checkpoints: that lie in it.
      recorder: of metrics and progress; there when the training has begun.
      cpu_seconds_before: that the processes before this one took.
      skipped_in_row: steps since the last one that changed the parameters, as far as recorded.

    Raises:
      UserError: the folder holds something else, or another process trains in it.
    """

    def __init__(self, folder: Path | str, training: Training, override: bool = False) -> None:
        require_type("training", training, Training)
        self.folder, self.training, self._override = as_path(folder, "folder"), training, override
        self._changes: Differences = {}  # process 0's
        with contextlib.ExitStack() as held:
            on_main_process(functools.partial(self._create_and_lock, held))
            held.enter_context(quiet_threads())
            self.checkpoints = Checkpoints(self.folder)
            held.callback(self.checkpoints.close)
            self._held = held.pop_all()
        self.recorder: Recorder
        self.cpu_seconds_before = 0.0
        self.skipped_in_row = 0
        self._last: tuple[int, Mapping[str, Any]] | None = None  # the step not yet written down
        self._waited_s = 0.0
        self._first, self._tokens_before = 0, 0
        self._rates = LearningRates(training.train)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the saves under way, and close.

        Raises:
          OSError: the disk is full.
        """
        with self._held:
            if kind is None:
                self._record_last()
                self.checkpoints.wait()

    def begin_or_resume(self) -> TrainState:
        """Return the state to go on from: the last whole checkpoint's, or in a new folder the first one.

        `int(state.step)` steps are done. What is trained is said on stderr.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        training = self.training
        position: dict[str, Any] | None = None
        if self.checkpoints.latest() is None:
            state = training.first_state()
        else:
            training.release_init()
            state, position = self.checkpoints.restore_latest_whole(training.compiled.sharded_shapes())
            self.cpu_seconds_before, self._first = float(position["cpu_seconds"]), int(position["step"])
            self._tokens_before = int(position.get("tokens_seen", self._first * training.tokens_per_step))
        on_main_process(self._record_override)
        since, others = 0, 0
        if is_main_process():
            config = read_run_config(self.folder)
            since, others = config.data_since, len(config.changed_since(self._first) & CHANGING_LOSSES)
        self.checkpoints.data_since = of_main_process(since)
        other_losses = of_main_process(others) > 0
        if position is not None:
            state = adapted(state, position.get("precision"), training, other_losses)
        _say_what_is_trained(training, self._first)
        peak, steps = _peak_tokens_per_s(training), training.train.max_steps
        self.recorder = make_recorder(self.folder, self._first, steps, training.tokens_per_step, peak)
        self._held.callback(self.recorder.close)
        return state

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step down, in metrics.jsonl, TensorBoard and the progress on stderr.

        That happens at the next call, so that the devices never wait for this process.

        Args:
          step: its number, from 1 on.
          metrics: scalars, of Training.step or a caller's own; with loss, nats per token.

        Raises:
          UserError: there is no loss.
          OSError: the disk is full; a checkpoint that was being saved may be what met it.
        """
        if "loss" not in metrics:
            raise UserError(f"step {step} has {', '.join(metrics) or 'no figures'}, expected loss among them")
        self.checkpoints.raise_failed_save()
        waited = self.training.input_wait_s
        self.recorder.waited(waited - self._waited_s)
        self._waited_s = waited
        self._record_last()
        self._last = (step, metrics)

    def validate(self, state: TrainState) -> float:
        """Measure the validation loss and write it down; return it, nats per token."""
        self.pause()
        figures = self.training.evaluate(state)
        self.recorder.validation(int(state.step), figures)
        return figures["val_loss"]

    def has_validation(self, step: int) -> bool:
        """Whether a validation of a step is written down."""
        found = is_main_process() and any(
            row["step"] == step and "val_loss" in row for row in read_metrics(self.folder)
        )
        return of_main_process(int(found)) == 1

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Save a checkpoint, in the background; the two latest ones and the best one by val_loss stay.

        Args:
          state: after the last step.
          val_loss: nats per token, measured on this very state; None when it was not. One that is not finite
            counts as none: the best checkpoint stays.
        """
        self.pause()
        step = int(state.step)
        position = {
            "step": step,
            "tokens_seen": self.tokens_seen(step),
            "cpu_seconds": self.cpu_seconds_before + cpu_seconds(),
            "precision": self.training.train.precision,
        }
        known = val_loss is not None and math.isfinite(val_loss)
        self.checkpoints.save(state, position, val_loss if known else None)

    def tokens_seen(self, step: int) -> int:
        """Return how many tokens the run was trained on after a step, those before an override included."""
        return self._tokens_before + (step - self._first) * self.training.tokens_per_step

    def best_step(self) -> int | None:
        """Return the step of the checkpoint that evaluate and convert take; None where there is none."""
        self.checkpoints.wait()
        return self.checkpoints.best()

    def best_val_loss(self) -> float | None:
        """Return the val_loss of the checkpoint that evaluate and convert take; None where none has one."""
        best = self.best_step()
        return None if best is None else self.checkpoints.val_loss(best)

    def pause(self) -> None:
        """Write the last step down, and leave the time until the next one out of tokens/s."""
        self._record_last()
        self.recorder.pause()

    def _create_and_lock(self, held: contextlib.ExitStack) -> None:
        if self._override:
            self._changes = changes(self.folder, self.training)
        else:
            create_run(self.folder, self.training.config)
        held.enter_context(lock_run(self.folder))
        (self.folder / "tokenizer").mkdir(exist_ok=True)
        self.training.tokenizer.save(self.folder / "tokenizer")

    def _record_override(self) -> None:
        """Write down what was changed, now that the state is whole that it applies to."""
        if self._changes:
            say(f"{self.folder}: changed after step {self._first}: {in_words(self._changes)}")
            record(self.folder, self.training.config, self._changes, self._first)

    def _record_last(self) -> None:
        """Write the last step down, if that is not done; waits until the devices have finished it."""
        if self._last is None:
            return
        step, metrics = self._last
        self._last = None
        values = {name: np.asarray(value).item() for name, value in metrics.items() if name != "step"}
        self.skipped_in_row = int(values.pop("skipped_in_row", 0))
        # A skipped step does not count for the optimizer, which knows what the rate of the next one is.
        taken = step - int(values.get("skipped", 0)) + (self.skipped_in_row > 0)
        values["learning_rate"] = self._rates.at(taken)
        values["tokens_seen"] = self.tokens_seen(step)
        if self.skipped_in_row:
            say(
                f"step {step} was skipped: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            )
        if self.training.train.precision != "fp16":
            values.pop("loss_scale", None)
        self.recorder.step(step, values)


def _say_what_is_trained(training: Training, first: int) -> None:
    settings = training.train
    resuming = f", resuming after step {first}" if first else ""
    say(
        f"{training.config.preset}: {training.parameter_count:,} parameters, "
        f"{training.mesh.size} {jax.default_backend()} device(s) "
        f"as {dict(training.mesh.shape)}, {training.tokens_per_step:,} tokens a step, "
        f"{settings.max_steps} steps, {settings.precision}, {training.attention}{resuming}"
    )


def _peak_tokens_per_s(training: Training) -> float | None:
    """Return what all devices would do at their peak rate, and say what that rests on."""
    device, precision = jax.devices()[0], training.train.precision
    peak, work = peak_flops(device.device_kind, precision), flops_per_token(training.model)
    if peak is None:
        say(f"{work:.3g} FLOPs a token; no MFU: no {precision} peak of {device.device_kind!r} is known")
        return None
    say(
        f"{work:.3g} FLOPs a token; MFU is of {peak / 1e12:g} TFLOP/s {precision} "
        f"on each {device.device_kind} (datasheet, dense)"
    )
    return peak * training.mesh.size / work
