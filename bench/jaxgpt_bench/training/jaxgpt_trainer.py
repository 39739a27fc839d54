"""The project's own trainer, timed: the step that `jaxgpt train` compiles.

    python -m jaxgpt_bench.training.jaxgpt_trainer '{"engine": "jaxgpt", "devices": 1, "model": {...}, ...}'

is what the bench starts (see common/workers.py).
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from jaxgpt.training.devices.malloc import keep_freed_memory, reserve_memory
from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
from jaxgpt.training.devices.precision import compute_capability
from jaxgpt.training.model.numerics import choose_numerics
from jaxgpt.training.model.params import pad_vocabulary
from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes
from jaxgpt_bench.profile.profile import profile_steps
from jaxgpt_bench.training.trainer import Batch, Trainer, serve_steps


class JaxgptSteps:
    """The compiled step of `jaxgpt train`, and the state that it changes.

    Args:
      trainer: what to compile.
    """

    def __init__(self, trainer: Trainer) -> None:
        model, train = trainer.model, trainer.train
        if trainer.platform == "cpu":
            keep_freed_memory(model, train, trainer.devices)
            use_cpu_devices(trainer.devices)
        numerics, _ = choose_numerics(model, train, jax.default_backend(), compute_capability())
        numerics = numerics._replace(flash=numerics.flash and trainer.flash is not False)
        mesh = make_mesh(f"data={trainer.devices}", trainer.devices if trainer.platform == "cpu" else 0)
        self._program = CompiledTraining(model, train, mesh, numerics)
        started = time.perf_counter()
        self._compiled = self._program.compile_step()
        self.compile_s: float | None = time.perf_counter() - started
        if trainer.platform == "cpu":
            reserve_memory(peak_bytes(self._compiled) * trainer.devices)
        state = self._program.first_state()
        weights = {name: jnp.asarray(array) for name, array in load_file(trainer.weights).items()}
        params = pad_vocabulary(weights, train.vocab_multiple)
        self._state = state._replace(
            params={name: jax.device_put(params[name], leaf.sharding) for name, leaf in state.params.items()}
        )

    def start(self, batch: Batch) -> Any:
        """Start a step."""
        shape, sharding = self._program.batch_shape, self._program.batch_sharding
        placed = [jax.device_put(part.reshape(shape), sharding) for part in batch]
        self._state, metrics = self._compiled(self._state, *placed)
        return metrics["loss"]

    def peak_bytes(self) -> int:
        """Return the most memory that was allocated on the GPU."""
        return int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))

    def profile(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the JSON object of a StepProfile."""

        def take_steps() -> None:
            for batch in batches:
                self.start(batch)
            jax.block_until_ready(self._state)

        return profile_steps(take_steps, len(batches), self._compiled).to_json()


if __name__ == "__main__":
    serve_steps(JaxgptSteps)
