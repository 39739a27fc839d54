"""The training loop of `jaxgpt train`: batch, step, record, and at their times validate, save, sample, stop.

`Trainer._steps` is the loop, to be read first. What a step is stands in run/training.py, what is written in
run/run_folder.py; a script has a loop of its own around the same two (docs/training-scripts.md).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.config import TrainConfig
from jaxgpt.shared.console import Result, cpu_seconds, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic, write_json
from jaxgpt.training.devices.memory import free_device_bytes
from jaxgpt.training.devices.mesh import replicated
from jaxgpt.training.devices.processes import (
    CommonError,
    all_agree,
    is_main_process,
    of_main_process,
    on_main_process,
)
from jaxgpt.training.devices.stop_signal import StopSignal
from jaxgpt.training.flax_session import FlaxSession
from jaxgpt.training.model.params import trim_vocabulary
from jaxgpt.training.run.folder import read_metrics, read_run_config, require_same_training
from jaxgpt.training.run.override import changes
from jaxgpt.training.run.run_folder import RunFolder
from jaxgpt.training.run.summary import finished_steps, losses_figures
from jaxgpt.training.run.training import Training
from jaxgpt.training.step.compiled import peak_bytes
from jaxgpt.training.step.state import TrainState

SAMPLE_TOKENS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Due:
    """What comes after a step: each happens at its own interval, and after the last step."""

    validation: bool
    checkpoint: bool
    sample: bool


class Trainer:
    """The loop of `jaxgpt train`.

    Args:
      training: what is trained.
      folder: the run folder.
      override: the run in it is changed to this training: see override.py.
      started: time.perf_counter() when the command began.
    """

    def __init__(self, training: Training, folder: Path, override: bool, started: float) -> None:
        self.training, self.folder, self.override = training, folder, override
        self.started, self.startup_s = started, 0.0
        self.settings = training.train
        self.stop: StopSignal

    def run(self) -> Result:
        """Train to max_steps; return the figures of summary.json.

        Raises:
          UserError: the folder holds another training or something else, or a step takes too much memory.
        """
        with StopSignal() as self.stop:
            on_main_process(self._require_fitting_folder)
            warn(self.settings)
            done = of_main_process(finished_steps(self.folder) or 0)
            if done != self.settings.max_steps:  # else there is nothing left to do
                self._require_room()
            with RunFolder(self.folder, self.training, self.override) as run:
                state = run.begin_or_resume()
                first = int(state.step)
                step, stopped = self._steps(run, state, first)
                taken = run.best_step()
            if stopped and (step < self.settings.max_steps or self._has_failed(run)):
                return self._stopped(run, step, stopped)
            return self._finish(run, first, taken)

    def _require_fitting_folder(self) -> None:
        if self.override:
            changes(self.folder, self.training)
        else:
            require_same_training(self.folder, self.training.config)

    def _require_room(self) -> None:
        """Raise UserError when a step would take more memory than a device has left."""
        needed, free = peak_bytes(self.training.compiled_step), free_device_bytes()
        fits = free is None or needed <= free
        if not all_agree(fits):
            has = f"{free / 1e9:.2f} GB are free" if free and not fits else "another process has less"
            raise CommonError(
                f"a training step needs {needed / 1e9:.2f} GB on each device, {has}; raise "
                "--grad-accum-steps or --loss-chunks, give --remat, or split the model: --mesh fsdp=N "
                "(jaxgpt plan says what fits)"
            )

    def _steps(self, run: RunFolder, state: TrainState, first: int) -> tuple[int, str | None]:
        """Train from step `first` + 1 on; return the last step, and why it was if not for max_steps."""
        step, stopped = first, None
        if first == 0 and self.training.config.init is not None:
            self._validate(run, state, is_saved=True)  # where it goes on from
        if self._lacks_validation(run, first):
            run.checkpoints.add_val_loss(first, self._validate(run, state, is_saved=True))
        for step in range(first + 1, self.settings.max_steps + 1):
            state, metrics = self.training.step(state, self.training.batch(step))
            if step == first + 1:
                self._note_startup(metrics)
            run.record(step, metrics)
            stopped = self._reason_to_stop(run, step)
            due = self._due(step, stopped is not None)
            val_loss = self._validate(run, state) if due.validation else None
            if due.checkpoint:
                run.save(state, val_loss)
            if due.sample:
                self._sample(run, state, step)
            if stopped:
                break
        return step, stopped

    def _validate(self, run: RunFolder, state: TrainState, is_saved: bool = False) -> float:
        """Return the validation loss; the steps so far are saved first where that finds no memory."""
        try:
            return run.validate(state)
        except jax.errors.JaxRuntimeError as error:
            # What validates is compiled when it is due first. Of several processes the others would not save.
            if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
                raise
            if not is_saved:
                run.save(state)
            raise UserError(
                f"validation after step {int(state.step)} finds no memory, the step is saved; raise "
                "--grad-accum-steps or --loss-chunks, with --override"
            ) from error

    def _lacks_validation(self, run: RunFolder, first: int) -> bool:
        """Whether the run stopped right where its loss was to be measured, and only saved."""
        is_time = first == self.settings.max_steps or first % self.settings.eval_every == 0
        return is_time and first > run.checkpoints.data_since and not run.has_validation(first)

    def _note_startup(self, metrics: Mapping[str, jax.Array]) -> None:
        """Wait for the first step, and say how long everything until its end took."""
        jax.block_until_ready(metrics["loss"])
        self.startup_s = time.perf_counter() - self.started
        say(f"first step after {self.startup_s:.1f} s, of which compiling {self.training.compile_s:.1f} s")

    def _reason_to_stop(self, run: RunFolder, step: int) -> str | None:
        if self.stop.requested(step):
            return "asked to stop"
        if self._has_failed(run):
            return f"{run.skipped_in_row} steps in a row were not finite or spiked"
        return None

    def _has_failed(self, run: RunFolder) -> bool:
        return run.skipped_in_row > self.settings.max_skipped

    def _due(self, step: int, stopped: bool) -> Due:
        """Return what comes after a step; a training that stops before its last step only saves."""
        settings = self.settings
        is_last = step == settings.max_steps
        stopped = stopped and not is_last

        def is_time(every: int) -> bool:
            return is_last or step % every == 0

        samples = not stopped and settings.sample_every > 0 and is_time(settings.sample_every)
        return Due(
            validation=not stopped and is_time(settings.eval_every),
            checkpoint=stopped or is_time(settings.checkpoint_every),
            sample=samples and self._holds_whole_model,
        )

    @functools.cached_property
    def _holds_whole_model(self) -> bool:
        """Whether a device has room for all parameters, which a sample takes, beside the training."""
        free = free_device_bytes()
        params = self.training.compiled.abstract.params
        whole = sum(math.prod(leaf.shape) * 4 for leaf in params.values())
        holds = all_agree(free is None or self.training.mesh.shape["fsdp"] == 1 or whole <= free / 2)
        if not holds:
            say("no samples are drawn: the whole model does not fit on one device beside the training")
        return holds

    def _sample(self, run: RunFolder, state: TrainState, step: int) -> None:
        """Write a sample beside the others and record it."""
        run.pause()
        whole = jax.jit(lambda params: params, out_shardings=replicated(self.training.mesh))(state.params)
        if not is_main_process():
            return
        local = {name: leaf.addressable_data(0) for name, leaf in whole.items()}
        model = self.training.model
        session = FlaxSession(model, trim_vocabulary(local, model.vocab_size))
        sampling = Sampling(temperature=0.7, seed=self.settings.seed)
        text = generate(session, self.training.tokenizer, "", SAMPLE_TOKENS, sampling).text
        (self.folder / "samples").mkdir(exist_ok=True)
        write_atomic(self.folder / "samples" / f"step_{step:08d}.txt", text + "\n")
        run.recorder.sample(step, text)

    def _stopped(self, run: RunFolder, step: int, why: str) -> Result:
        """Say where it goes on; figures of a training that is not finished."""
        say(f"{why}: step {step} is saved in {self.folder}; the same command goes on from there")
        failed = self._has_failed(run)
        interrupted = not failed and self.stop.interrupted()
        return Result({"stopped": why, "steps": step}, passed=not failed, interrupted=interrupted)

    def _finish(self, run: RunFolder, first: int, taken: int | None) -> Result:
        """Write summary.json from what checkpoints and metrics hold; other processes than 0 give the steps.

        Args:
          run: closed.
          first: steps that were done before.
          taken: the step that evaluate and convert take.

        Raises:
          UserError: the last validation loss is not finite.
        """
        figures: dict[str, Any] = {"steps": self.settings.max_steps}
        # What process 0 has written, another host may not see yet.
        on_main_process(lambda: figures.update(self._summarized(run, first, taken)))
        return Result(figures)

    def _summarized(self, run: RunFolder, first: int, taken: int | None) -> dict[str, Any]:
        step, rows = self.settings.max_steps, read_metrics(self.folder)
        losses = losses_figures(rows, run.checkpoints.data_since, taken)
        if not math.isfinite(losses["val_loss"]):
            raise UserError(
                f"the training in {self.folder} diverged: its validation loss after step {step} is not "
                "finite; begin anew in another --out with a lower --learning-rate"
            )
        rate, seconds = run.recorder.tokens_per_s, run.cpu_seconds_before
        if first < step:
            seconds += cpu_seconds()
        else:
            rate = next((row["tokens_per_s"] for row in reversed(rows) if "tokens_per_s" in row), 0.0)
        figures: dict[str, Any] = {
            "preset": self.training.config.preset,
            "steps": step,
            "parameters": self.training.parameter_count,
            "tokens_seen": run.tokens_seen(step),
            "tokens_per_s": round(rate, 1),
            "cpu_seconds": round(seconds, 1),
            **losses,
        }
        overrides = read_run_config(self.folder).overrides
        if overrides:
            figures["overrides"] = list(overrides)
        if first < step:
            figures["startup_s"] = round(self.startup_s, 2)
            figures["compile_s"] = round(self.training.compile_s, 2)
        if first < step or finished_steps(self.folder) != step:
            write_json(self.folder / "summary.json", figures)
        say(
            f"{self.folder}: {step} steps done, validation loss {losses['val_loss']:.4f} nats/token, "
            f"{losses['val_bits_per_byte']:.4f} bits/byte; best {losses['best_val_loss']:.4f} at step "
            f"{losses['best_step']}, convert takes step {taken}"
            + ("" if first < step else " (nothing left to do)")
        )
        return figures


def warn(train: TrainConfig) -> None:
    """Say what is allowed, and probably not meant."""
    if train.warmup_steps >= train.max_steps:
        say(
            f"WARNING: warmup_steps ({train.warmup_steps}) is not below max_steps ({train.max_steps}): the "
            "learning rate rises until the last step and never falls; give a lower --warmup-steps"
        )
