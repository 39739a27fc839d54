"""A training as a program holds it: model, settings, data set and mesh, with the compiled step between them.

    training = jaxgpt.Training(model, train, dataset, jaxgpt.make_mesh())
    state = training.first_state()
    state, metrics = training.step(state, training.batch(1))

Nothing is written here; run_folder.py does that. The loop is the caller's: trainer.py has that of
`jaxgpt train`, docs/examples/train_data_parallel.py a shorter one.
"""

import functools
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset, count_windows
from jaxgpt.shared.errors import UserError, require_type
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.training.batches import Batches
from jaxgpt.training.devices.malloc import reserve_memory
from jaxgpt.training.devices.precision import compute_capability
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.model.params import unpadded_shape
from jaxgpt.training.model.qat_scales import with_scales
from jaxgpt.training.run.folder import RunConfig, data_entry
from jaxgpt.training.run.init_from import InitSource
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes
from jaxgpt.training.step.state import TrainState
from jaxgpt.training.step.train_step import make_eval_step
from jaxgpt.training.validation import validation_loss

Batch = tuple[jax.Array, jax.Array]  # inputs and targets, (A, B, T), split over the devices along B


class Training:
    """A model that is trained on a data set, over the devices of a mesh.

    Args:
      model: shape; its vocabulary is the data set's.
      train: settings.
      dataset: of open_dataset.
      mesh: of make_mesh.
      init: what it begins with, of open_init_source; new parameters if not given.
      preset: name that config.json of a run folder gives it.

    Attributes:
      config: what config.json of a run folder holds.
      tokenizer: the data set's.
      parameter_count: of the model.
      tokens_per_step: of all devices together.
      input_wait_s: seconds, so far, that devices without work waited for a batch.
      compile_s: seconds that tracing and compiling the step took; 0 before that.

    Raises:
      UserError: model, settings, data set, mesh or init do not fit each other.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        dataset: Dataset,
        mesh: Mesh,
        *,
        init: InitSource | None = None,
        preset: str = "custom",
    ) -> None:
        given = (("model", model, ModelConfig), ("train", train, TrainConfig), ("dataset", dataset, Dataset))
        for name, value, kind in (*given, ("mesh", mesh, Mesh)):
            require_type(name, value, kind)
        _require_fitting_data(model, dataset)
        _require_mask(train, dataset)
        self.tokenizer = _load_tokenizer_of(dataset)
        _require_even_split(train, mesh.size)
        entry = None
        self._init, self._params = init, None
        if init is not None:
            init.check_dataset(dataset)
            entry = init.known
            if entry is None:
                self._params, entry = init.read(model)
        self.config = RunConfig(preset, model, train, data_entry(dataset), entry)
        self.model, self.train, self.dataset, self.mesh = model, train, dataset, mesh
        platform, capability = jax.default_backend(), compute_capability()
        numerics, self.attention = choose_numerics(model, train, platform, capability)
        self.compiled = CompiledTraining(model, train, mesh, numerics)
        eval_step = make_eval_step(self.compiled.graph, train.loss_chunks, mesh, numerics.flash)
        self._eval_step = jax.jit(eval_step, compiler_options=self.compiled.compiler_options)
        self._batches = Batches(
            dataset.train,
            model.block_size,
            train.batch_size,
            train.seed,
            dataset.train_mask,
            train.prompt_loss_weight,
        )
        self.parameter_count = sum(
            math.prod(unpadded_shape(name, leaf.shape, model.vocab_size))
            for name, leaf in self.compiled.abstract.params.items()
        )
        self.tokens_per_step = train.batch_size * model.block_size
        self.input_wait_s = self.compile_s = 0.0
        self._last_loss: Any = None  # an array of the devices, of the last step

    def first_state(self) -> TrainState:
        """Return the state before the first step, on the devices."""
        params, self._params = self._params, None  # not held while training
        if params is None and self._init is not None:
            params, _ = self._init.read(self.model)
        if self.model.qat:
            params = with_scales(self.model, params, self.dataset.train, self.train.seed)
        return self.compiled.first_state(params)

    def release_init(self) -> None:
        """Forget the parameters that it would begin with; first_state would read them again."""
        self._params = None

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, which follows from the seed and the step alone.

        Args:
          step: from 1 on.

        Returns:
          Inputs and targets, (A, B, T): micro-batches, sequences, tokens; each device has its sequences.
        """
        started = time.perf_counter()
        A, B, _ = shape = self.compiled.batch_shape
        rows = functools.cache(lambda start, stop: self._batches.micro(step - 1, A, slice(start, stop)))

        def place(which: int) -> jax.Array:
            def part(index: Any) -> Any:
                return rows(*index[1].indices(B)[:2])[which]

            return jax.make_array_from_callback(shape, self.compiled.batch_sharding, part)

        placed = place(0), place(1)
        if self._last_loss is None or self._last_loss.is_ready():
            self.input_wait_s += time.perf_counter() - started
        return placed

    @functools.cached_property
    def compiled_step(self) -> jax.stages.Compiled:
        """The compiled step; compiling takes seconds to minutes."""
        say("compiling")
        started = time.perf_counter()
        compiled = self.compiled.compile_step()
        self.compile_s = time.perf_counter() - started
        if jax.default_backend() == "cpu":
            reserve_memory(peak_bytes(compiled) * jax.local_device_count())
        return compiled

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take an optimizer step; returns before the devices are done.

        A step whose loss or gradient is not finite (with fp16 the loss scale halves then) counts as done and
        changes no parameter.

        Args:
          state: is given up: its memory becomes the new state's.
          batch: inputs and targets.

        Returns:
          The new state, and scalars: loss (mean, nats per token), grad_norm (before clipping), loss_scale,
          skipped and skipped_in_row (steps that changed nothing).
        """
        state, metrics = self.compiled_step(state, *batch)
        self._last_loss = metrics["loss"]
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Measure the loss over the validation split, or the part of it that `eval_tokens` says.

        Returns:
          val_loss (nats per token) and val_bits_per_byte.
        """
        train = self.train
        return validation_loss(
            self._eval_step,
            state.params,
            self.dataset,
            self.model.block_size,
            train.batch_size // train.grad_accum_steps,
            self.mesh,
            train.eval_tokens,
        )


def _require_fitting_data(model: ModelConfig, dataset: Dataset) -> None:
    """Raise UserError unless the vocabulary is the model's, and both splits hold block_size + 1 tokens."""
    if model.vocab_size != dataset.vocab_size:
        raise UserError(
            f"the model has vocab_size {model.vocab_size}, the tokenizer of {dataset.folder} "
            f"{dataset.vocab_size} tokens; give the model the data set's vocab_size"
        )
    count_windows(dataset.val, model.block_size)  # says now what would fail at the first validation
    if len(dataset.train) < model.block_size + 1:
        raise UserError(
            f"the training split has {len(dataset.train)} tokens, block_size is {model.block_size}; "
            "prepare more text or lower --block-size"
        )


def _require_mask(train: TrainConfig, dataset: Dataset) -> None:
    """Raise UserError where prompts are to count less, and the data set does not say what they are."""
    if train.prompt_loss_weight and dataset.train_mask is None:
        raise UserError(
            f"prompt_loss_weight is {train.prompt_loss_weight}, and {dataset.folder} does not tell prompts "
            "from answers; prepare it with --answers-only, or give --prompt-loss-weight 0"
        )


def _load_tokenizer_of(dataset: Dataset) -> Tokenizer:
    tokenizer = load_tokenizer(dataset.folder, str(dataset.manifest["tokenizer"]["name"]))
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        raise UserError(f"tokenizer files in {dataset.folder} do not match its manifest; prepare it again")
    return tokenizer


def _require_even_split(train: TrainConfig, devices: int) -> None:
    """Raise UserError unless each device gets as many sequences of a micro-batch as the others."""
    micro = train.batch_size // train.grad_accum_steps
    if micro % devices:
        batch, given = train.batch_size, train.grad_accum_steps
        fitting = [steps for steps in range(1, batch + 1) if batch % (steps * devices) == 0]
        nearest = min(fitting, key=lambda steps: abs(steps - given), default=None)
        raise UserError(
            f"a micro-batch of {micro} sequences (batch_size / grad_accum_steps) does not divide over "
            f"{devices} devices; "
            + ("" if nearest is None else f"give --grad-accum-steps {nearest}, or ")
            + f"choose as --batch-size a multiple of {devices * given}"
        )
