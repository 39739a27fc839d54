"""A training of `jaxgpt-bench recipe` in a process of its own, on one core.

    python -m jaxgpt_bench.recipe.training_process '{"run": {...}, "shape": {...}, "data": ..., "core": 0}'

is what the bench starts; it prints the outcome as JSON.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt_bench.recipe.runs import Outcome, Run


def train(run: Run, shape: dict[str, int], dataset: Dataset) -> Outcome:
    """Train as `jaxgpt train` does, without a run folder, and measure the validation loss at the end."""
    import jax

    from jaxgpt.training.batches import Batches
    from jaxgpt.training.devices.malloc import keep_freed_memory, reserve_memory
    from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
    from jaxgpt.training.model.numerics import FLOAT32
    from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes
    from jaxgpt.training.step.train_step import make_eval_step
    from jaxgpt.training.validation import validation_loss

    sizes: dict[str, Any] = {name: value for name, value in shape.items() if name != "batch_size"}
    model = ModelConfig(vocab_size=dataset.vocab_size, **sizes)
    # The optimizer reads the precision of its products from the settings, the model from its numerics.
    settings: dict[str, Any] = {"precision": run.newton_schulz, **run.settings}
    config = TrainConfig(max_steps=run.steps, seed=run.seed, batch_size=shape["batch_size"], **settings)
    use_cpu_devices(1)
    keep_freed_memory(model, config, 1)
    mesh = make_mesh("", 1)
    program = CompiledTraining(model, config, mesh, FLOAT32._replace(on_cpu=True))
    step = program.compile_step()
    reserve_memory(peak_bytes(step))
    batches = Batches(dataset.train, model.block_size, config.batch_size, config.seed)
    state = program.first_state()
    averaged, first_averaged = None, run.steps - max(round(run.average_last * run.steps), 1)
    add = jax.jit(lambda total, params: jax.tree.map(jax.numpy.add, total, params))
    started = time.process_time()
    for number in range(run.steps):
        batch = batches.micro(number, config.grad_accum_steps, slice(None))
        state, _ = step(state, *(jax.device_put(part, program.batch_sharding) for part in batch))
        if run.average_last and number >= first_averaged:
            kept = jax.tree.map(jax.numpy.copy, state.params) if averaged is None else state.params
            averaged = kept if averaged is None else add(averaged, kept)
    jax.block_until_ready(state)
    spent = time.process_time() - started
    params = state.params
    if averaged is not None:
        params = jax.tree.map(lambda total: total / (run.steps - first_averaged), averaged)
    evaluate = jax.jit(make_eval_step(program.graph))
    found = validation_loss(evaluate, params, dataset, model.block_size, config.batch_size, mesh)
    loss: float | None = found["val_loss"]
    bits: float | None = found["val_bits_per_byte"]
    if not math.isfinite(found["val_loss"]):
        loss = bits = None
    return Outcome(run=run, val_loss=loss, val_bits_per_byte=bits, cpu_seconds=round(spent, 2))


def main() -> None:
    """Take the training that argv describes."""
    order = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {order["core"]})  # before JAX starts its threads: one for each core
    outcome = train(Run.from_json(order["run"]), order["shape"], open_dataset(Path(order["data"])))
    sys.stdout.write(json.dumps(outcome.to_json()) + "\n")


if __name__ == "__main__":
    main()
