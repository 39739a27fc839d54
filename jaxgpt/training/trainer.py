"""The training loop, in its run folder: batch, step, record, and at their times validate, save, sample, stop.

`jaxgpt train` makes a Trainer and calls `run`; `Trainer._steps` is the loop, to be read first.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.console import Result, cpu_seconds, say
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic, write_json
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.training.batches import Batches
from jaxgpt.training.devices.malloc import reserve_memory
from jaxgpt.training.devices.memory import free_device_bytes
from jaxgpt.training.devices.mesh import replicated
from jaxgpt.training.devices.precision import compute_capability, peak_flops
from jaxgpt.training.devices.processes import StopSignal, all_agree, is_main_process
from jaxgpt.training.flax_session import FlaxSession
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.model.params import HostParams, abstract_params, trim_vocabulary
from jaxgpt.training.model.qat_scales import with_scales
from jaxgpt.training.run.checkpoints import Checkpoints
from jaxgpt.training.run.folder import RunConfig, read_metrics
from jaxgpt.training.run.recorder import make_recorder
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes
from jaxgpt.training.step.state import TrainState
from jaxgpt.training.step.train_step import make_eval_step
from jaxgpt.training.validation import validation_loss

SAMPLE_TOKENS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Due:
    """What comes after a step: each happens at its own interval, and after the last step."""

    validation: bool
    checkpoint: bool
    sample: bool

    @property
    def any(self) -> bool:
        """Whether the loop pauses for something."""
        return self.validation or self.checkpoint or self.sample


class Trainer:
    """A training in its run folder.

    Args:
      config: what is trained.
      dataset: on what.
      tokenizer: the data set's.
      mesh: over which devices.
      folder: the run folder, with its config.json.
      params: what it begins with, in the memory of the host; None for new ones.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        tokenizer: Tokenizer,
        mesh: Mesh,
        folder: Path,
        params: HostParams | None = None,
    ) -> None:
        self.config, self.dataset, self.tokenizer = config, dataset, tokenizer
        self.mesh, self.folder, self._params = mesh, folder, params
        numerics, self.attention = choose_numerics(
            config.model, config.train.precision, jax.default_backend(), compute_capability()
        )
        self.compiled = CompiledTraining(config.model, config.train, mesh, numerics)
        self.eval_step = jax.jit(make_eval_step(self.compiled.graph, config.train.loss_chunks))
        self.batches = Batches(
            dataset.train, config.model.block_size, config.train.batch_size, config.train.seed
        )
        self.parameter_count = sum(math.prod(leaf.shape) for leaf in abstract_params(config.model).values())
        self.tokens_per_step = config.train.batch_size * config.model.block_size
        self.cpu_seconds_before = 0.0
        self.skipped_in_row = 0
        self._unrecorded: tuple[int, dict[str, Any]] | None = None  # a step and its metrics
        self.stop = StopSignal()

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """The compiled step."""
        say("compiling")
        compiled = self.compiled.compile_step()
        if jax.default_backend() == "cpu":
            reserve_memory(peak_bytes(compiled) * jax.local_device_count())
        return compiled

    def require_room(self) -> None:
        """Raise UserError when a step would take more memory than a device has left."""
        needed, free = peak_bytes(self.train_step), free_device_bytes()
        fits = free is None or needed <= free
        if not all_agree(fits):
            has = f"{free / 1e9:.2f} GB are free" if free and not fits else "another process has less"
            raise UserError(
                f"a training step needs {needed / 1e9:.2f} GB on each device, {has}; raise "
                "--grad-accum-steps or --loss-chunks, give --remat, or split the model: --mesh fsdp=N "
                "(jaxgpt plan says what fits)"
            )

    def run(self) -> Result:
        """Train to max_steps; return the figures of summary.json."""
        self.checkpoints = Checkpoints(self.folder)
        state, first = self._begin()
        self._say_what_is_trained(first)
        settings, peak = self.config.train, self._peak_tokens_per_s()
        self.recorder = make_recorder(self.folder, first, settings.max_steps, self.tokens_per_step, peak)
        try:
            step, stopped = self._steps(state, first)
            self.checkpoints.wait()
        finally:
            self.recorder.close()
            self.checkpoints.close()
            self.stop.close()
        if stopped and step < settings.max_steps:
            say(f"{stopped}: step {step} is saved in {self.folder}; the same command goes on from there")
            failed = self.skipped_in_row > settings.max_skipped
            return Result({"stopped": stopped, "steps": step}, passed=not failed)
        return self._finish(first)

    def _begin(self) -> tuple[TrainState, int]:
        """Return the state to go on from and the number of steps done."""
        params, self._params = self._params, None  # not held while training
        if self.checkpoints.latest() is None:
            if self.config.model.qat:
                params = with_scales(self.config.model, params, self.dataset.train, self.config.train.seed)
            return self.compiled.first_state(params), 0
        del params
        state, position = self.checkpoints.restore_latest_whole(self.compiled.sharded_shapes())
        self.cpu_seconds_before = float(position["cpu_seconds"])
        return state, int(position["step"])

    def _steps(self, state: TrainState, first: int) -> tuple[int, str | None]:
        """Train from step `first` + 1 on; return the last step, and why it was if not for max_steps."""
        step, stopped = first, None
        if first == 0 and self.config.init is not None:
            self._validate(state, 0)  # where it goes on from
        for step in range(first + 1, self.config.train.max_steps + 1):
            batch = self._next_batch(step)
            state, metrics = self.train_step(state, *batch)
            self._record_previous()  # one step behind, so that the devices never wait for the host
            self._unrecorded = (step, metrics)
            stopped = self._reason_to_stop(step)
            due = self._due(step, stopped is not None)
            val_loss = None
            if due.any:
                self._record_previous()
            if due.validation:
                val_loss = self._validate(state, step)
            if due.checkpoint:
                self.checkpoints.save(state, self._position(step), val_loss)
            if due.sample:
                self._sample(state, step)
            if due.any:
                self.recorder.pause()
            if stopped:
                break
        return step, stopped

    def _reason_to_stop(self, step: int) -> str | None:
        if self.stop.requested(step):
            return "asked to stop"
        if self.skipped_in_row > self.config.train.max_skipped:
            return f"{self.skipped_in_row} steps in a row were not finite or spiked"
        return None

    def _due(self, step: int, stopped: bool) -> "Due":
        """Return what comes after a step; a training that stops only saves."""
        settings = self.config.train

        def is_time(every: int) -> bool:
            return step == settings.max_steps or step % every == 0

        samples = not stopped and settings.sample_every > 0 and is_time(settings.sample_every)
        return Due(
            validation=not stopped and is_time(settings.eval_every),
            checkpoint=stopped or is_time(settings.checkpoint_every),
            sample=samples and self._holds_whole_model,
        )

    def _next_batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        """Return the batch of a step, and record how long devices without work waited for it."""
        started = time.perf_counter()
        batch = self._batch(step - 1)
        if self._unrecorded is None or self._unrecorded[1]["loss"].is_ready():
            self.recorder.waited(time.perf_counter() - started)
        return batch

    def _batch(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Return inputs and targets of a step, (A, B, T), split over the devices along B."""
        A, B, _ = shape = self.compiled.batch_shape
        rows = functools.cache(lambda start, stop: self.batches.micro(index, A, slice(start, stop)))

        def place(which: int) -> jax.Array:
            def part(index: Any) -> Any:
                return rows(*index[1].indices(B)[:2])[which]

            return jax.make_array_from_callback(shape, self.compiled.batch_sharding, part)

        return place(0), place(1)

    def _say_what_is_trained(self, first: int) -> None:
        settings = self.config.train
        resuming = f", resuming after step {first}" if first else ""
        say(
            f"{self.config.preset}: {self.parameter_count:,} parameters, "
            f"{self.mesh.size} {jax.default_backend()} device(s) "
            f"as {dict(self.mesh.shape)}, {self.tokens_per_step:,} tokens a step, "
            f"{settings.max_steps} steps, {settings.precision}, {self.attention}{resuming}"
        )

    def _peak_tokens_per_s(self) -> float | None:
        """Return what all devices would do at their peak rate, and say what that rests on."""
        device, precision = jax.devices()[0], self.config.train.precision
        peak, work = peak_flops(device.device_kind, precision), flops_per_token(self.config.model)
        if peak is None:
            say(f"{work:.3g} FLOPs a token; no MFU: no {precision} peak of {device.device_kind!r} is known")
            return None
        say(
            f"{work:.3g} FLOPs a token; MFU is of {peak / 1e12:g} TFLOP/s {precision} "
            f"on each {device.device_kind} (datasheet, dense)"
        )
        return peak * self.mesh.size / work

    def _record_previous(self) -> None:
        """Write down the last step, if that is not done; waits until the devices have finished it."""
        if self._unrecorded is None:
            return
        step, metrics = self._unrecorded
        self._unrecorded = None
        values = {name: value.item() for name, value in metrics.items()}
        self.skipped_in_row = int(values.pop("skipped_in_row"))
        if self.skipped_in_row:
            say(
                f"step {step} was skipped: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            )
        if self.config.train.precision != "fp16":
            del values["loss_scale"]
        self.recorder.step(step, values)

    @functools.cached_property
    def _holds_whole_model(self) -> bool:
        """Whether a device has room for all parameters, which a sample takes, beside the training."""
        free = free_device_bytes()
        whole = sum(math.prod(leaf.shape) * 4 for leaf in self.compiled.abstract.params.values())
        holds = all_agree(free is None or self.mesh.shape["fsdp"] == 1 or whole <= free / 2)
        if not holds:
            say("no samples are drawn: the whole model does not fit on one device beside the training")
        return holds

    def _validate(self, state: TrainState, step: int) -> float:
        """Measure and record the validation loss; return it, nats per token."""
        micro = self.config.train.batch_size // self.config.train.grad_accum_steps
        block_size = self.config.model.block_size
        figures = validation_loss(self.eval_step, state.params, self.dataset, block_size, micro, self.mesh)
        self.recorder.validation(step, figures)
        return figures["val_loss"]

    def _position(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint holds beside the arrays."""
        return {
            "step": step,
            "tokens_seen": step * self.tokens_per_step,
            "cpu_seconds": self.cpu_seconds_before + cpu_seconds(),
        }

    def _sample(self, state: TrainState, step: int) -> None:
        """Write a sample beside the others and record it."""
        whole = jax.jit(lambda params: params, out_shardings=replicated(self.mesh))(state.params)
        if not is_main_process():
            return
        local = {name: leaf.addressable_data(0) for name, leaf in whole.items()}
        model = self.config.model
        session = FlaxSession(model, trim_vocabulary(local, model.vocab_size))
        sampling = Sampling(temperature=0.7, seed=self.config.train.seed)
        text = generate(session, self.tokenizer, "", SAMPLE_TOKENS, sampling).text
        (self.folder / "samples").mkdir(exist_ok=True)
        write_atomic(self.folder / "samples" / f"step_{step:08d}.txt", text + "\n")
        self.recorder.sample(step, text)

    def _finish(self, first: int) -> Result:
        """Write summary.json from what the checkpoints and metrics hold."""
        step = self.config.train.max_steps
        rows = [row for row in read_metrics(self.folder) if "val_loss" in row]
        figures: dict[str, Any] = {
            "preset": self.config.preset,
            "steps": step,
            "parameters": self.parameter_count,
            "tokens_seen": step * self.tokens_per_step,
            "val_loss": rows[-1]["val_loss"],
            "val_bits_per_byte": rows[-1]["val_bits_per_byte"],
        }
        if first < step:
            figures["tokens_per_s"] = round(self.recorder.tokens_per_s, 1)
            figures["cpu_seconds"] = round(self.cpu_seconds_before + cpu_seconds(), 1)
        if first < step and is_main_process():
            write_json(self.folder / "summary.json", figures)
        say(
            f"{self.folder}: {step} steps done, validation loss {figures['val_loss']:.4f} nats/token, "
            f"{figures['val_bits_per_byte']:.4f} bits/byte"
            + ("" if first < step else " (nothing left to do)")
        )
        return Result(figures)
