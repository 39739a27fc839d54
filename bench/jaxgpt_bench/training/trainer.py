"""What the trainers of `jaxgpt-bench train` share: weights, batches, and the process that times steps.

All begin with the same weights, see the same batches and follow a constant rate, so that the losses of those
with the same optimizer tell whether they do the same work.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.machine import SHARE_VARIABLES
from jaxgpt_bench.common.step_rows import step_name
from jaxgpt_bench.common.workers import HUGE_PAGES, serve

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


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
      variant: settings in which it differs from the first row; what PyTorch is told besides.
      flash: attention by cuDNN; None leaves it to the trainer.
      xla_flags: given to XLA.
    """

    engine: str
    devices: int
    platform: str
    model: ModelConfig
    train: TrainConfig
    weights: str
    variant: str = ""
    flash: bool | None = None
    xla_flags: str = ""

    @property
    def name(self) -> str:
        """Name of the row."""
        return step_name(self.engine, self.devices, self.variant)

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


class Steps(Protocol):
    """A trainer that is ready.

    Attributes:
      compile_s: that compiling took, as soon as it is known.
    """

    compile_s: float | None

    def start(self, batch: Batch) -> Any:
        """Start a step; float() of what it returns waits for the loss."""
        ...

    def peak_bytes(self) -> int:
        """Return the most memory that was allocated on a GPU."""
        ...

    def profile(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the JSON object of a StepProfile over steps with these batches."""
        ...


def random_batches(model: ModelConfig, train: TrainConfig) -> Iterator[Batch]:
    """Yield inputs and targets (B, T) without end, of tokens as uneven as those of text."""
    random = np.random.default_rng(0)
    while True:
        drawn = random.zipf(1.3, size=(train.batch_size, model.block_size + 1))
        tokens = (drawn % model.vocab_size).astype(np.int32)
        yield tokens[:, :-1], tokens[:, 1:]


def serve_steps(prepare: Callable[[Trainer], Steps]) -> None:
    """Be a trainer's process.

    Args:
      prepare: compiles.
    """
    serve(functools.partial(answering, prepare))


def answering(
    prepare: Callable[[Trainer], Steps], order: dict[str, Any]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compile a step; return what takes N of them for each {"steps": N}, or profiles N for {"profile": N}."""
    trainer = Trainer.of(order)
    steps = prepare(trainer)
    batches = random_batches(trainer.model, trainer.train)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        """Take N steps; the losses are fetched at the end, so that no device waits for the host."""
        if "profile" in question:
            return profile([next(batches) for _ in range(question["profile"])])
        taken = [next(batches) for _ in range(question["steps"])]
        started, cpu_started = time.perf_counter(), time.process_time()
        found = [steps.start(batch) for batch in taken]
        losses = [float(loss) for loss in found]
        return {
            "losses": losses,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "compile_s": steps.compile_s,
            "device_bytes": None if trainer.platform == "cpu" else steps.peak_bytes(),
        }

    def profile(taken: Sequence[Batch]) -> dict[str, Any]:
        try:
            return {"profile": steps.profile(taken)}
        except Exception as error:  # whatever a profiler lacks, the times that were measured count
            return {"error_of_profile": f"{type(error).__name__}: {error}"}

    return answer


def environment(trainer: Trainer, threads: int, caches: Path) -> dict[str, str]:
    """Return the variables that a trainer's process runs with.

    Args:
      trainer: of the process.
      threads: of the CPU.
      caches: folder for what was compiled, so that a process that is started again need not compile it again.
    """
    found = {"OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if trainer.xla_flags:
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {trainer.xla_flags}".strip()
    if trainer.platform == "cpu":
        # This project's trainer asks for huge pages itself, where it knows what a step takes.
        pages = HUGE_PAGES if trainer.engine == "pytorch" else {}
        return {**found, **pages, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if not any(os.environ.get(name) for name in SHARE_VARIABLES):  # JAX refuses both, and would take the CPU
        found[SHARE_VARIABLES[0]] = "0.95"  # of a GPU; JAX stops at 0.75 by itself
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
    }.items():
        found[name] = os.environ.get(name, value)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [name for name in visible if name] or [str(i) for i in range(trainer.devices)]
    return {**found, "CUDA_VISIBLE_DEVICES": ",".join(devices[: trainer.devices])}


def weights_file(model: ModelConfig, folder: Path) -> Path:
    """Write the weights that all trainers of a shape begin with, under the training's names."""
    import jax
    from safetensors.numpy import save_file

    from jaxgpt.training.model.params import init_params

    path = folder / f"weights{len(list(folder.glob('weights*')))}.safetensors"
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = {name: np.asarray(array) for name, array in init_params(model, 0).items()}
    save_file(params, path)
    return path
