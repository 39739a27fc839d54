"""What a training compiles, from shapes alone: for the training itself, for `jaxgpt plan`, for tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.devices.mesh import batch_sharding, state_shardings
from jaxgpt.training.model.numerics import Numerics
from jaxgpt.training.model.params import HostParam, HostParams, Params, graph_of, init_params, pad_vocabulary
from jaxgpt.training.step.optimizer import make_optimizer
from jaxgpt.training.step.state import TrainState, first_state
from jaxgpt.training.step.train_step import make_train_step

# What makes a platform's compiler take kernels whose results repeat to the bit, in another process, too: XLA
# then leaves out atomic sums (cuDNN's backward attention has them) and chooses no kernel by its time.
DETERMINISTIC_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_deterministic_ops": True}}


class CompiledTraining:
    """A training as compiled functions over a mesh; making one allocates nothing.

    Args:
      model: shape.
      train: settings.
      mesh: over which devices.
      numerics: dtypes and attention.

    Attributes:
      graph: the model's structure.
      abstract: shapes and dtypes of the state.
      shardings: how it lies on the mesh.
      batch_shape: (A, B, T), micro-batches of an optimizer step.
      batch_sharding: how they lie on the mesh.
      compiler_options: what the compiler is told besides; empty for its own choice.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig, mesh: Mesh, numerics: Numerics) -> None:
        self._model, self._train, self._mesh = model, train, mesh
        self.graph = graph_of(model, numerics)
        self._flash = numerics.flash
        shares = (numerics.on_cpu and not mesh.is_multi_process) or mesh.shape["fsdp"] > 1
        self._optimizer = make_optimizer(train, model, mesh if shares else None)
        self._first_state = self._new_state  # one object: JAX traces it once for both uses
        self.abstract: TrainState = jax.eval_shape(self._first_state, None)
        self.shardings: TrainState = state_shardings(mesh, self.abstract)
        self.batch_shape = (
            train.grad_accum_steps,
            train.batch_size // train.grad_accum_steps,
            model.block_size,
        )
        self.batch_sharding = batch_sharding(mesh, axis=1, ndim=3)
        platform = mesh.devices.flat[0].platform
        self.compiler_options: dict[str, str | bool] = dict(
            DETERMINISTIC_OPTIONS.get(platform, {}) if train.deterministic else {}
        )

    def _new_state(self, params: Params | None) -> TrainState:
        if params is None:
            params = pad_vocabulary(init_params(self._model, self._train.seed), self._train.vocab_multiple)
        return first_state(params, self._optimizer, self._train.seed, self._train)

    def first_state(self, params: HostParams | None = None) -> TrainState:
        """Return the state before the first step, on the devices.

        Args:
          params: what to begin with, without padding; new ones if not given.
        """
        placed = None if params is None else self._put_on_devices(params)
        return jax.jit(self._first_state, out_shardings=self.shardings)(placed)

    def _put_on_devices(self, params: HostParams) -> Params:
        """Put each device's part of the parameters on it."""

        def place(array: HostParam, leaf: Any, sharding: Any) -> jax.Array:
            missing = [(0, new - old) for new, old in zip(leaf.shape, array.shape, strict=True)]
            whole = np.pad(array, missing) if array.shape != leaf.shape else array
            return jax.make_array_from_callback(leaf.shape, sharding, whole.__getitem__)

        return jax.tree.map(place, params, self.abstract.params, self.shardings.params)

    def sharded_shapes(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state, to read a checkpoint into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract,
            self.shardings,
        )

    def compile_step(self) -> jax.stages.Compiled:
        """Compile the training step (steps.make_train_step): (state, inputs, targets) -> (state, metrics).

        The state is donated; inputs and targets have batch_shape and lie as batch_sharding says.
        """
        return self.lower_step().compile(self.compiler_options)

    def lower_step(self, platforms: tuple[str, ...] | None = None) -> jax.stages.Lowered:
        """Return the step before XLA optimizes it.

        Args:
          platforms: to lower it for, such as ("cuda",), which need not be there; the mesh's if not given.
        """
        drops, flash = self._model.drops, self._flash
        step = make_train_step(self.graph, self._optimizer, self._mesh, self._train, drops, flash)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))
        batch = jax.ShapeDtypeStruct(self.batch_shape, jnp.int32, sharding=self.batch_sharding)
        return jitted.trace(self.sharded_shapes(), batch, batch).lower(lowering_platforms=platforms)


def peak_bytes(compiled: Any) -> float:
    """Return arguments + temporaries + results that don't reuse an argument, in bytes a device."""
    found = compiled.memory_analysis()
    return float(
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
