"""`jaxgpt train`: the training loop.

    jaxgpt train tiny --data data/stdlib --out runs/tiny --cpu-devices 2

One program for one CPU, several GPUs and several simulated devices: `jax.jit` over a mesh. Running the
same command again resumes from the last checkpoint, bit for bit.
"""

import contextlib
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from jaxgpt.batches import Batches
from jaxgpt.checkpoints import Checkpoints
from jaxgpt.config import find_preset
from jaxgpt.evaluate import validation_loss
from jaxgpt.hardware import (
    best_precision,
    compute_capability,
    flops_per_token,
    free_device_bytes,
    keep_freed_memory,
    peak_flops,
    reserve_memory,
)
from jaxgpt.mesh import make_mesh, replicated, use_cpu_devices
from jaxgpt.model import abstract_params, trim_vocabulary
from jaxgpt.processes import StopSignal, all_agree, first_does, is_first, join_processes
from jaxgpt.program import Program, peak_bytes
from jaxgpt.progress import Recorder, make_recorder
from jaxgpt.runs import (
    RunConfig,
    claim_run,
    data_entry,
    lock_run,
    read_metrics,
    read_run_config,
    require_claimable,
)
from jaxgpt.sample import JaxEngine
from jaxgpt.shared.console import Result, cpu_seconds, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic, write_json
from jaxgpt.shared.generation import generate
from jaxgpt.shared.sampling import Sampling
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.steps import TrainState, choose_numerics, make_eval_step
from jaxgpt.tokens import Dataset, open_dataset, windows

SAMPLE_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a GPT-2; running the same command again resumes.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      data: dataset folder of `jaxgpt prepare`; the vocabulary comes from it.
      out: the run folder.
      max_steps: optimizer steps.
      seed: of initialization, data order and dropout.
      cpu_devices: simulate so many devices on the CPU (in each process); 0 takes the devices that JAX finds.
      mesh: layout of the devices, such as data=4,fsdp=2; all on data if not given.
      batch_size: sequences an optimizer step, all devices together.
      accumulate: micro-batches that a step's batch is cut into, to save memory.
      block_size: longest context, tokens.
      n_layer: blocks.
      n_head: attention heads.
      n_embd: channels.
      dropout: share of activations dropped.
      positions: learned, or rotary.
      optimizer: adamw, or muon for the blocks' matrices.
      learning_rate: peak, of the blocks' matrices.
      embedding_rate: peak, of embeddings, gains and biases.
      final_rate: share of the peak that is left at the end.
      warmup_steps: steps of linear rise.
      cooldown: shape of the fall, cosine or linear.
      weight_decay: of matrices.
      precision: of matrix products, fp32, bf16 or fp16 (with loss scaling); if not given, what the device
        is best at.
      remat: compute blocks again in the backward pass, to save memory.
      loss_chunks: pieces in which logits are computed, to save memory.
      vocab_multiple: pad the token table to a multiple while training; checkpoints are read without it.
      spike_guard: skip steps whose loss lies so many standard deviations above its mean; 0 for none.
      max_skipped: skipped steps in a row after which the training stops.
      eval_every: steps between validations.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between samples; 0 for none.
      distributed: one of several processes that JAX finds by itself (Slurm, Kubernetes, Open MPI).
      coordinator: host:port of process 0, where JAX can't find it.
      process_count: number of processes, with coordinator.
      process_index: which one this is, with coordinator.
      join_timeout: seconds to wait for the other processes.
      json: print one JSON document with all figures on stdout.
    """

    preset: tyro.conf.Positional[str]
    data: Path
    out: Path
    max_steps: int | None = None
    seed: int | None = None
    cpu_devices: int = 0
    mesh: str = ""
    batch_size: int | None = None
    accumulate: int | None = None
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float | None = None
    positions: Literal["learned", "rotary"] | None = None
    optimizer: Literal["adamw", "muon"] | None = None
    learning_rate: float | None = None
    embedding_rate: float | None = None
    final_rate: float | None = None
    warmup_steps: int | None = None
    cooldown: Literal["cosine", "linear"] | None = None
    weight_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    remat: bool | None = None
    loss_chunks: int | None = None
    vocab_multiple: int | None = None
    spike_guard: float | None = None
    max_skipped: int | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    sample_every: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    join_timeout: int = 300
    json: bool = False


def run_config(options: TrainOptions, dataset: Dataset) -> RunConfig:
    """Combine preset, data and options; the precision is the preset's where none is given."""
    preset = find_preset(options.preset)
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    model = preset.model(dataset.vocab_size)
    model = dataclasses.replace(model, **_fields_of(model, given))
    train = dataclasses.replace(preset.train, **_fields_of(preset.train, given))
    return RunConfig(options.preset, model, train, data_entry(dataset))


def _with_precision(config: RunConfig, folder: Path) -> RunConfig:
    """Take the precision that a run began with, or what this device is best at."""
    began = (folder / "config.json").exists()
    precision = read_run_config(folder).train.precision if began else best_precision()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def _fields_of(target: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(target)}
    return {name: value for name, value in given.items() if name in names}


def train(options: TrainOptions) -> Result:
    """Run `jaxgpt train`.

    Raises:
      UserError: options, data or an earlier run that do not fit.
    """
    find_preset(options.preset)
    dataset = open_dataset(options.data)
    config = run_config(options, dataset)
    use_cpu_devices(options.cpu_devices)
    keep_freed_memory(config.model, config.train, max(options.cpu_devices, 1))
    join_processes(
        options.coordinator,
        options.process_count,
        options.process_index,
        options.distributed,
        options.join_timeout,
    )
    if options.precision is None:
        config = _with_precision(config, options.out)
    windows(dataset.val, config.model.block_size)  # says now what would fail at the first validation
    if len(dataset.train) < config.model.block_size + 1:
        raise UserError(
            f"the training split has {len(dataset.train)} tokens, block_size is {config.model.block_size}; "
            "prepare more text or lower --block-size"
        )
    tokenizer = load_tokenizer(options.data, str(dataset.manifest["tokenizer"]["name"]))
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        raise UserError(f"tokenizer files in {options.data} do not match its manifest; prepare it again")
    mesh = make_mesh(options.mesh, options.cpu_devices)
    micro = config.train.batch_size // config.train.accumulate
    if micro % mesh.size:
        raise UserError(
            f"a micro-batch of {micro} sequences (batch_size / accumulate) does not divide over "
            f"{mesh.size} devices; choose a multiple of {mesh.size * config.train.accumulate}"
        )

    trainer = Trainer(config, dataset, tokenizer, mesh, options.out)
    first_does(functools.partial(require_claimable, options.out, config))
    if not (options.out / "summary.json").exists():  # else there is nothing left to do
        trainer.require_room()
    with contextlib.ExitStack() as held:

        def claim() -> None:
            claim_run(options.out, config)
            held.enter_context(lock_run(options.out))
            (options.out / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(options.out / "tokenizer")

        first_does(claim)
        return trainer.run()


class Trainer:
    """A training in its run folder.

    Args:
      config: what is trained.
      dataset: on what.
      tokenizer: the data set's.
      mesh: over which devices.
      folder: the run folder, with its config.json.
    """

    def __init__(
        self, config: RunConfig, dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh, folder: Path
    ) -> None:
        self.config, self.dataset, self.tokenizer = config, dataset, tokenizer
        self.mesh, self.folder = mesh, folder
        numerics, self.attention = choose_numerics(
            config.model, config.train.precision, jax.default_backend(), compute_capability()
        )
        self.program = Program(config.model, config.train, mesh, numerics)
        self.eval_step = jax.jit(make_eval_step(self.program.graph, config.train.loss_chunks))
        self.batches = Batches(
            dataset.train, config.model.block_size, config.train.batch_size, config.train.seed
        )
        self.tokens_per_step = config.train.batch_size * config.model.block_size
        self.cpu_seconds_before = 0.0
        self.skipped_in_row = 0
        self.stop = StopSignal()

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """The compiled step."""
        say("compiling")
        compiled = self.program.compile_step()
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
                f"a training step needs {needed / 1e9:.2f} GB on each device, {has}; raise --accumulate or "
                "--loss-chunks, give --remat, or split the model: --mesh fsdp=N (jaxgpt plan says what fits)"
            )

    def run(self) -> Result:
        """Train to max_steps; return the figures of summary.json."""
        settings = self.config.train
        self.checkpoints = Checkpoints(self.folder)
        state, first = self._start()
        count = sum(math.prod(leaf.shape) for leaf in abstract_params(self.config.model).values())
        resuming = f", resuming after step {first}" if first else ""
        say(
            f"{self.config.preset}: {count:,} parameters, {self.mesh.size} {jax.default_backend()} device(s) "
            f"as {dict(self.mesh.shape)}, {self.tokens_per_step:,} tokens a step, "
            f"{settings.max_steps} steps, {settings.precision}, {self.attention}{resuming}"
        )
        peak = self._peak_tokens_per_s()
        figures: dict[str, float] = {}
        recorder = make_recorder(self.folder, first, settings.max_steps, self.tokens_per_step, peak)
        stopped: str | None = None
        step = first
        try:
            pending: tuple[int, dict[str, Any], float] | None = None
            for step in range(first + 1, settings.max_steps + 1):
                started = time.perf_counter()
                batch = self._batch(step - 1)
                idle = pending is None or pending[1]["loss"].is_ready()
                input_wait_s = time.perf_counter() - started if idle else 0.0
                state, metrics = self.train_step(state, *batch)
                if pending is not None:  # one step behind, so that the device never waits for us
                    self._record(recorder, *pending)
                pending = (step, metrics, input_wait_s)
                if self.stop.requested(step):
                    stopped = "asked to stop"
                elif self.skipped_in_row > settings.max_skipped:
                    stopped = f"{self.skipped_in_row} steps in a row were not finite or spiked"
                last = step == settings.max_steps
                evaluates = not stopped and (last or step % settings.eval_every == 0)
                saves = bool(stopped) or last or step % settings.checkpoint_every == 0
                samples = not stopped and settings.sample_every
                samples = samples and (last or step % settings.sample_every == 0) and self._holds_whole_model
                if evaluates or saves or samples:
                    self._record(recorder, *pending)
                    pending = None
                if evaluates:
                    figures = self._validate(state)
                    recorder.validation(step, figures)
                if saves:
                    self.checkpoints.save(
                        state, self._position(step), figures["val_loss"] if evaluates else None
                    )
                if samples:
                    recorder.sample(step, self._sample(state, step))
                if evaluates or saves or samples:
                    recorder.pause()
                if stopped:
                    break
            self.checkpoints.wait()
        finally:
            recorder.close()
            self.checkpoints.close()
            self.stop.close()
        if stopped and step < settings.max_steps:
            say(f"{stopped}: step {step} is saved in {self.folder}; the same command goes on from there")
            failed = self.skipped_in_row > settings.max_skipped
            return Result({"stopped": stopped, "steps": step}, passed=not failed)
        return self._finish(first, count, recorder.tokens_per_s)

    def _start(self) -> tuple[TrainState, int]:
        """Return the state to go on from and the number of steps done."""
        if self.checkpoints.latest() is None:
            return self.program.first_state(), 0
        state, position = self.checkpoints.restore_latest_whole(self.program.placed())
        self.cpu_seconds_before = float(position["cpu_seconds"])
        return state, int(position["step"])

    def _batch(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Return inputs and targets of a step, (A, B, T), split over the devices along B."""
        A, B, _ = shape = self.program.batch_shape
        rows = functools.cache(lambda start, stop: self.batches.micro(index, A, slice(start, stop)))

        def place(which: int) -> jax.Array:
            def part(index: Any) -> Any:
                return rows(*index[1].indices(B)[:2])[which]

            return jax.make_array_from_callback(shape, self.program.batch_sharding, part)

        return place(0), place(1)

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

    def _record(self, recorder: Recorder, step: int, metrics: dict[str, Any], input_wait_s: float) -> None:
        values = {name: value.item() for name, value in metrics.items()}
        self.skipped_in_row = int(values.pop("skipped_in_row"))
        if self.skipped_in_row:
            say(
                f"step {step} was skipped: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            )
        if self.config.train.precision != "fp16":
            del values["loss_scale"]
        recorder.step(step, values, input_wait_s)

    @functools.cached_property
    def _holds_whole_model(self) -> bool:
        """Whether a device has room for all parameters, which a sample takes, beside the training."""
        free = free_device_bytes()
        whole = sum(math.prod(leaf.shape) * 4 for leaf in self.program.abstract.params.values())
        holds = all_agree(free is None or self.mesh.shape["fsdp"] == 1 or whole <= free / 2)
        if not holds:
            say("no samples are drawn: the whole model does not fit on one device beside the training")
        return holds

    def _validate(self, state: TrainState) -> dict[str, float]:
        micro = self.config.train.batch_size // self.config.train.accumulate
        block_size = self.config.model.block_size
        return validation_loss(self.eval_step, state.params, self.dataset, block_size, micro, self.mesh)

    def _position(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens_seen": step * self.tokens_per_step,
            "cpu_seconds": self.cpu_seconds_before + cpu_seconds(),
        }

    def _sample(self, state: TrainState, step: int) -> str:
        """Write a sample beside the others and return it."""
        whole = jax.jit(lambda params: params, out_shardings=replicated(self.mesh))(state.params)
        if not is_first():
            return ""
        local = {name: leaf.addressable_data(0) for name, leaf in whole.items()}
        model = self.config.model
        engine = JaxEngine(model, trim_vocabulary(local, model.vocab_size))
        sampling = Sampling(temperature=0.7, seed=self.config.train.seed)
        text = generate(engine, self.tokenizer, "", SAMPLE_TOKENS, sampling).text
        (self.folder / "samples").mkdir(exist_ok=True)
        write_atomic(self.folder / "samples" / f"step_{step:08d}.txt", text + "\n")
        return text

    def _finish(self, first: int, parameters: int, tokens_per_s: float) -> Result:
        """Write summary.json from what the checkpoints and metrics hold."""
        step = self.config.train.max_steps
        rows = [row for row in read_metrics(self.folder) if "val_loss" in row]
        figures: dict[str, Any] = {
            "preset": self.config.preset,
            "steps": step,
            "parameters": parameters,
            "tokens_seen": step * self.tokens_per_step,
            "val_loss": rows[-1]["val_loss"],
            "val_bits_per_byte": rows[-1]["val_bits_per_byte"],
        }
        if first < step:
            figures["tokens_per_s"] = round(tokens_per_s, 1)
            figures["cpu_seconds"] = round(self.cpu_seconds_before + cpu_seconds(), 1)
        if first < step and is_first():
            write_json(self.folder / "summary.json", figures)
        say(
            f"{self.folder}: {step} steps done, validation loss {figures['val_loss']:.4f} nats/token, "
            f"{figures['val_bits_per_byte']:.4f} bits/byte"
            + ("" if first < step else " (nothing left to do)")
        )
        return Result(figures)
