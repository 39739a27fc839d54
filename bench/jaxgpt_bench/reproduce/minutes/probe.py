"""The process that tries a training on this machine: what fits, how long a step takes, how fast the CPU is.

A process of its own, so that a device's memory is free again when it ends. Its answers are those of `attempt`
and `cpu_speed`.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.common.workers import Worker, serve
from jaxgpt_bench.reproduce.minutes.fit import MicroBatch, candidates, estimated_bytes

MODULE = "jaxgpt_bench.reproduce.minutes.probe"
ROOM = 0.95  # of a device's free memory that a step may take by the compiler's count
WARMUP_STEPS, LEAST_STEPS, MOST_STEPS, TIMED_S = 2, 3, 20, 6.0
FORWARDS, DECODED_TOKENS = 2, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A training that fits, as it was measured.

    Attributes:
      settings: batch_size, grad_accum_steps and remat, where they were looked for.
      why: in words.
      step_s: seconds of a step, median.
      startup_s: from the start of the process' work to the first step: data, parameters, compiling.
      block_size: tokens a sequence.
      tokens_per_step: of all devices.
      state_bytes: of parameters and optimizer, a checkpoint's.
      peak_bytes: of a device.
      device: its kind.
      platform: cpu, gpu.
      devices: how many.
      precision: of the products.
      attention: by which kernel, and why.
    """

    settings: dict[str, Any]
    why: str
    step_s: float
    startup_s: float
    block_size: int
    tokens_per_step: int
    state_bytes: int
    peak_bytes: float
    device: str
    platform: str
    devices: int
    precision: str
    attention: str

    @property
    def batch_size(self) -> int:
        """Sequences a step."""
        return self.tokens_per_step // self.block_size

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, of all devices."""
        return self.tokens_per_step / self.step_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuSpeed:
    """How fast the float32 PyTorch module of the model's shape is on this machine's CPU.

    Attributes:
      forward_s: seconds of a whole context.
      decode_s: of a token with a KV cache.
      cores: that this process may use.
    """

    forward_s: float
    decode_s: float
    cores: int


class Probe:
    """The process; a context that ends it.

    Args:
      data: the dataset folder.
    """

    def __init__(self, data: Path) -> None:
        with _one_line():
            self._worker = Worker("the trial", MODULE, {"data": str(data)}, {})

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def attempt(self, settings: dict[str, Any], fits_device: bool) -> Attempt:
        """Try a training; see `attempt`.

        Raises:
          UserError: not even one sequence fits.
        """
        answer = self._ask({"settings": settings, "fits_device": fits_device})
        return Attempt(**{field.name: answer[field.name] for field in dataclasses.fields(Attempt)})

    def cpu_speed(self, settings: dict[str, Any]) -> CpuSpeed:
        """Time the module of a training's shape; see `cpu_speed`."""
        answer = self._ask({"settings": settings, "cpu": True})
        return CpuSpeed(**{field.name: answer[field.name] for field in dataclasses.fields(CpuSpeed)})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with _one_line():
            answer = self._worker.ask(question)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Say in one line why the process stopped."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{error}; try it alone: jaxgpt train") from None


def attempt(data: Path, settings: dict[str, Any], fits_device: bool) -> dict[str, Any]:
    """Compile the step of a training and time it; nothing is written.

    Args:
      data: the dataset folder.
      settings: of `jaxgpt train`.
      fits_device: look for the largest micro-batch that fits; else the settings are taken as they are.

    Raises:
      UserError: not even one sequence fits.
    """
    import jax

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.shared.errors import UserError
    from jaxgpt.training.devices.memory import free_device_bytes
    from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
    from jaxgpt.training.devices.precision import best_precision, compute_capability
    from jaxgpt.training.model.numerics import choose_numerics
    from jaxgpt.training.options import run_config, train_options

    started = time.perf_counter()
    dataset = open_dataset(data)
    cpu_devices = settings.get("cpu_devices", 0)
    use_cpu_devices(cpu_devices)
    mesh, free = make_mesh(settings.get("mesh", ""), cpu_devices), free_device_bytes()
    precision = settings.get("precision") or best_precision()
    wanted = {**settings, "precision": precision}

    def config_of(**changed: Any) -> Any:
        return run_config(train_options(data=data, out=data, **{**wanted, **changed}), dataset)

    plain = config_of(**({"grad_accum_steps": 1} if fits_device else {}))
    numerics, _ = choose_numerics(plain.model, plain.train, jax.default_backend(), compute_capability())
    batch = plain.train.batch_size - plain.train.batch_size % mesh.size if fits_device else 0
    tries = list(candidates(batch, mesh.size)) if fits_device else [None]
    passed_over: list[str] = []
    for micro in tries:
        estimate = micro and estimated_bytes(plain.model, plain.train, micro, numerics.flash)
        if free is not None and estimate and estimate > free and micro is not tries[-1]:
            passed_over.append(f"{micro}: about {estimate / 1e9:.1f} GB")
            continue
        chosen = {} if micro is None else micro.settings(batch, mesh.size)
        found = _measured(config_of(**chosen), dataset, mesh, free, started)
        if "needs" not in found:
            return {**found, "settings": chosen, "why": _why(micro, found, free, passed_over)}
        passed_over.append(f"{micro}: {found['needs']}")
        say(f"{micro or 'a step'}: {found['needs']}, which does not fit")
        started = time.perf_counter()
    raise UserError(
        f"no micro-batch of this training fits the device ({'; '.join(passed_over[-3:])}); a smaller preset "
        "may, or a device with more memory"
    )


def _why(micro: MicroBatch | None, found: dict[str, Any], free: float | None, passed_over: list[str]) -> str:
    """Say what was chosen, in a line."""
    if micro is None:
        return "as the preset has it"
    room = "memory not known" if free is None else f"of {free / 1e9:.1f} GB free"
    larger = f"; too large: {passed_over[-1]}" if passed_over else ""
    return (
        f"micro-batches of {micro} on each of {found['devices']} {found['device']}, "
        f"{found['peak_bytes'] / 1e9:.1f} GB {room}{larger}"
    )


def _measured(config: Any, dataset: Any, mesh: Any, free: float | None, started: float) -> dict[str, Any]:
    """Compile and time a training; {"needs": ...} where it takes more memory than there is."""
    import jax

    from jaxgpt.training.run.training import Training
    from jaxgpt.training.step.compiled import peak_bytes

    try:
        training = Training(config.model, config.train, dataset, mesh, preset=config.preset)
        peak = peak_bytes(training.compiled_step)
        if free is not None and peak > ROOM * free:
            return {"needs": f"{peak / 1e9:.1f} GB"}
        state = training.first_state()
        for number in range(1, WARMUP_STEPS + 1):
            state, metrics = training.step(state, training.batch(number))
            jax.block_until_ready(metrics["loss"])
        startup = time.perf_counter() - started
        times: list[float] = []
        while len(times) < LEAST_STEPS or (len(times) < MOST_STEPS and sum(times) < TIMED_S):
            before = time.perf_counter()
            state, metrics = training.step(state, training.batch(len(times) + WARMUP_STEPS + 1))
            jax.block_until_ready(metrics["loss"])
            times.append(time.perf_counter() - before)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"needs": "more memory than the device gave"}
    return {
        "step_s": statistics.median(times),
        "startup_s": startup,
        "block_size": config.model.block_size,
        "tokens_per_step": training.tokens_per_step,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "peak_bytes": peak,
        "device": mesh.devices.flat[0].device_kind,
        "platform": mesh.devices.flat[0].platform,
        "devices": mesh.size,
        "precision": config.train.precision,
        "attention": training.attention,
    }


def cpu_speed(data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Time PyTorch's float32 module of a training's shape, with random weights."""
    from jaxgpt_export.generation.torch_session import TorchSession
    from jaxgpt_export.model.build import float_model

    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.shared.machine import usable_cores
    from jaxgpt.training.options import run_config, train_options
    from jaxgpt_bench.speed.random_models import random_tensors

    config = run_config(train_options(data=data, out=data, **settings), open_dataset(data)).model
    model = float_model(config, random_tensors(config))
    session = TorchSession(model)
    text = [0] * config.block_size
    session.prefill(text)  # not timed
    forward = min(_seconds(functools.partial(session.prefill, text)) for _ in range(FORWARDS))
    session.prefill([0])
    count = min(DECODED_TOKENS, config.block_size - 1)
    decode = statistics.median(_seconds(functools.partial(session.decode, 0)) for _ in range(count))
    return {"forward_s": forward, "decode_s": decode, "cores": usable_cores()}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answer(data: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Answer a question; {"error": ...} for what the user is to be told."""
    from jaxgpt.shared.errors import UserError

    try:
        if question.get("cpu"):
            return cpu_speed(data, question["settings"])
        return attempt(data, question["settings"], question["fits_device"])
    except UserError as error:
        return {"error": str(error)}


def prepare(order: dict[str, Any]) -> Any:
    """Return what answers questions about a data set."""
    return functools.partial(answer, Path(order["data"]))


if __name__ == "__main__":
    serve(prepare)
