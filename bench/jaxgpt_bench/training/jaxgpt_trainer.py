"""The project's own trainer, timed: the step that `jaxgpt train` compiles.

    python -m jaxgpt_bench.training.jaxgpt_trainer '{"engine": "jaxgpt", "devices": 1, "model": {...}, ...}'

is what the bench starts (see common/workers.py).
"""

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
from jaxgpt_bench.training.trainer import Batch, Step, Trainer, serve_steps


def make_step(trainer: Trainer) -> Step:
    """Return this project's compiled step."""
    model, train = trainer.model, trainer.train
    if trainer.platform == "cpu":
        keep_freed_memory(model, train, trainer.devices)
        use_cpu_devices(trainer.devices)
    numerics, _ = choose_numerics(model, train, jax.default_backend(), compute_capability())
    program = CompiledTraining(model, train, make_mesh(f"data={trainer.devices}"), numerics)
    compiled = program.compile_step()
    if trainer.platform == "cpu":
        reserve_memory(peak_bytes(compiled) * trainer.devices)
    state = program.first_state()
    weights = {name: jnp.asarray(array) for name, array in load_file(trainer.weights).items()}
    params = pad_vocabulary(weights, train.vocab_multiple)
    state = state._replace(
        params={name: jax.device_put(params[name], leaf.sharding) for name, leaf in state.params.items()}
    )

    def step(batch: Batch) -> Any:
        nonlocal state
        placed = [jax.device_put(part.reshape(program.batch_shape), program.batch_sharding) for part in batch]
        state, metrics = compiled(state, *placed)
        return metrics["loss"]

    return step


def peak_device_bytes() -> int:
    """Return the most memory that was allocated on the GPU."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


if __name__ == "__main__":
    serve_steps(make_step, peak_device_bytes)
