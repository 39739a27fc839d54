"""What the trainers of `jaxgpt-bench train` share: weights, batches, and the process that times steps.

All begin with the same weights, see the same batches and follow the same AdamW with a constant rate, so that
their losses tell whether they do the same work.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt_bench.common.workers import serve

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
Step = Callable[[Batch], Any]  # starts a step; what it returns becomes the loss by float()


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One row of the table.

    Attributes:
      engine: jaxgpt, pytorch (compiled by torch.compile).
      devices: it trains on; train.batch_size counts all of them.
      platform: cpu or gpu.
      model: shape.
      train: settings.
      weights: safetensors file with the training's names, which all begin with.
    """

    engine: str
    devices: int
    platform: str
    model: ModelConfig
    train: TrainConfig
    weights: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.engine}, {self.devices} device{'s' if self.devices > 1 else ''}"

    @property
    def module(self) -> str:
        """What its process runs."""
        return f"jaxgpt_bench.training.{self.engine}_trainer"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all devices."""
        return self.train.batch_size * self.model.block_size

    @classmethod
    def of(cls, order: dict[str, Any]) -> "Trainer":
        """Read what `dataclasses.asdict` wrote."""
        model, train = ModelConfig(**order["model"]), TrainConfig(**order["train"])
        return cls(**{**order, "model": model, "train": train})


def random_batches(model: ModelConfig, train: TrainConfig) -> Iterator[Batch]:
    """Yield inputs and targets (B, T) without end, of tokens as uneven as those of text."""
    random = np.random.default_rng(0)
    while True:
        drawn = random.zipf(1.3, size=(train.batch_size, model.block_size + 1))
        tokens = (drawn % model.vocab_size).astype(np.int32)
        yield tokens[:, :-1], tokens[:, 1:]


def serve_steps(make_step: Callable[[Trainer], Step], peak_bytes: Callable[[], int]) -> None:
    """Be a trainer's process: compile a step, then take N of them for each {"steps": N}.

    Args:
      make_step: compiles.
      peak_bytes: tells the most memory that was allocated on a GPU.
    """

    def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        trainer = Trainer.of(order)
        step = make_step(trainer)
        batches = random_batches(trainer.model, trainer.train)

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            """Take N steps; the losses are fetched at the end, so that no device waits for the host."""
            taken = [next(batches) for _ in range(question["steps"])]
            started, cpu_started = time.perf_counter(), time.process_time()
            found = [step(batch) for batch in taken]
            losses = [float(loss) for loss in found]
            return {
                "losses": losses,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu_started,
                "device_bytes": None if trainer.platform == "cpu" else peak_bytes(),
            }

        return answer

    serve(prepare)


def environment(trainer: Trainer, threads: int) -> dict[str, str]:
    """Return the variables that a trainer's process runs with."""
    found = {"OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if trainer.platform == "cpu":
        return {**found, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [name for name in visible if name] or [str(i) for i in range(trainer.devices)]
    return {**found, "CUDA_VISIBLE_DEVICES": ",".join(devices[: trainer.devices])}


def weights_file(model: ModelConfig, folder: Path) -> Path:
    """Write the weights that all trainers begin with, under the training's names."""
    import jax
    from safetensors.numpy import save_file

    from jaxgpt.training.model.params import init_params

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = {name: np.asarray(array) for name, array in init_params(model, 0).items()}
    save_file(params, folder / "weights.safetensors")
    return folder / "weights.safetensors"
