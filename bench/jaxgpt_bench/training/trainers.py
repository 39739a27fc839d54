"""The trainers that `jaxgpt-bench train` times, each in a process of its own.

    python -m jaxgpt_bench.training.trainers '{"engine": "pytorch", "devices": 1, "model": {...}, ...}'

is what the bench starts (see workers.py). Both trainers begin with the same weights, see the same batches
and follow the same AdamW with a constant rate, so that their losses tell whether they do the same work.
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
class Contestant:
    """One row of the table.

    Attributes:
      engine: jaxgpt, pytorch (compiled by torch.compile).
      devices: it trains on; train.batch_size counts all of them.
      platform: cpu or gpu.
      model: shape.
      train: settings.
      weights: safetensors file with Hugging Face's names, which all begin with.
    """

    engine: str
    devices: int
    platform: str
    model: dict[str, Any]
    train: dict[str, Any]
    weights: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.engine}, {self.devices} device{'s' if self.devices > 1 else ''}"


def random_batches(model: ModelConfig, train: TrainConfig) -> Iterator[Batch]:
    """Yield inputs and targets (B, T) without end, of tokens as uneven as those of text."""
    random = np.random.default_rng(0)
    while True:
        drawn = random.zipf(1.3, size=(train.batch_size, model.block_size + 1))
        tokens = (drawn % model.vocab_size).astype(np.int32)
        yield tokens[:, :-1], tokens[:, 1:]


def jaxgpt_step(contestant: Contestant, model: ModelConfig, train: TrainConfig) -> Step:
    """Return this project's compiled step."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from jaxgpt.training.devices.malloc import keep_freed_memory, reserve_memory
    from jaxgpt.training.devices.mesh import make_mesh, use_cpu_devices
    from jaxgpt.training.devices.precision import compute_capability
    from jaxgpt.training.model.numerics import choose_numerics
    from jaxgpt.training.model.params import pad_vocabulary
    from jaxgpt.training.step.compiled import CompiledTraining, peak_bytes

    if contestant.platform == "cpu":
        keep_freed_memory(model, train, contestant.devices)
        use_cpu_devices(contestant.devices)
    numerics, _ = choose_numerics(model, train.precision, jax.default_backend(), compute_capability())
    program = CompiledTraining(model, train, make_mesh(f"data={contestant.devices}"), numerics)
    compiled = program.compile_step()
    if contestant.platform == "cpu":
        reserve_memory(peak_bytes(compiled) * contestant.devices)
    state = program.first_state()
    weights = {name: jnp.asarray(array) for name, array in load_file(contestant.weights).items()}
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


def pytorch_step(contestant: Contestant, model: ModelConfig, train: TrainConfig) -> Step:
    """Return a step of transformers' GPT-2 by torch.compile, with SDPA and a fused AdamW."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from jaxgpt.shared.huggingface import hf_name

    device = torch.device("cuda" if contestant.platform == "gpu" else "cpu")
    # On a GPU TensorFloat-32, as JAX does by itself; on a CPU float32 stays float32 on both sides.
    torch.set_float32_matmul_precision("high" if contestant.platform == "gpu" else "highest")
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.block_size,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    gpt = transformers.GPT2LMHeadModel(config)
    tensors = {hf_name(name): tensor for name, tensor in load_file(contestant.weights).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    gpt.load_state_dict(tensors, strict=True)
    gpt.to(device).train()
    parameters = list(gpt.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (train.beta1, train.beta2)
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, fused=True)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision]

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = gpt(inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    compiled = torch.compile(loss_of)

    def step(batch: Batch) -> Any:
        inputs, targets = (torch.from_numpy(part.astype(np.int64)).to(device) for part in batch)
        total = torch.zeros((), device=device)
        for micro in zip(
            inputs.chunk(train.grad_accum_steps), targets.chunk(train.grad_accum_steps), strict=True
        ):
            loss = compiled(*micro) / train.grad_accum_steps
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def prepare(order: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compile a trainer; return what answers {"steps": N}."""
    contestant = Contestant(**order)
    model, train = ModelConfig(**contestant.model), TrainConfig(**contestant.train)
    step = {"jaxgpt": jaxgpt_step, "pytorch": pytorch_step}[contestant.engine](contestant, model, train)
    batches = random_batches(model, train)

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
            "device_bytes": _peak_device_bytes(contestant),
        }

    return answer


def _peak_device_bytes(contestant: Contestant) -> int | None:
    """Return the most memory that was allocated on a GPU; None on the CPU."""
    if contestant.platform == "cpu":
        return None
    if contestant.engine == "jaxgpt":
        import jax

        return int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
    import torch

    return int(torch.cuda.max_memory_allocated())


def environment(contestant: Contestant, threads: int) -> dict[str, str]:
    """Return the variables that a contestant's process runs with."""
    found = {"OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if contestant.platform == "cpu":
        return {**found, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [name for name in visible if name] or [str(i) for i in range(contestant.devices)]
    return {**found, "CUDA_VISIBLE_DEVICES": ",".join(devices[: contestant.devices])}


def weights_file(model: ModelConfig, folder: Path) -> Path:
    """Write the weights that all contestants begin with, under the training's names."""
    import jax
    from safetensors.numpy import save_file

    from jaxgpt.training.model.params import init_params

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = {name: np.asarray(array) for name, array in init_params(model, 0).items()}
    save_file(params, folder / "weights.safetensors")
    return folder / "weights.safetensors"


if __name__ == "__main__":
    serve(prepare)
