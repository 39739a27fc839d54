"""transformers' GPT-2, timed: torch.compile, SDPA and a fused AdamW.

    python -m jaxgpt_bench.training.pytorch_trainer '{"engine": "pytorch", "devices": 1, "model": {...}, ...}'

is what the bench starts (see common/workers.py).
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.devices.malloc import keep_freed_memory
from jaxgpt_bench.training.trainer import Batch, Trainer, serve_steps

ATTENTION = "causal_sdpa"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What PyTorch is told besides.

    Attributes:
      mode: of torch.compile.
      cudnn_attention: SDPA by cuDNN where it can; else PyTorch chooses.
      plain_logits: the loss takes the logits as the head's product leaves them: in its dtype, with those of
        the rows that pad the table. Else in float32 and without.
    """

    mode: str | None = None
    cudnn_attention: bool = False
    plain_logits: bool = False


TUNINGS = {
    "plain": Tuning(),
    "tuned": Tuning(cudnn_attention=True, plain_logits=True),
    "max-autotune": Tuning(mode="max-autotune-no-cudagraphs"),
}


def causal_sdpa(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attend to earlier tokens without a mask, so that PyTorch takes a flash kernel.

    transformers' own function hands a mask over whenever it is compiled by a PyTorch before 2.14.
    """
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def load_gpt2(model: ModelConfig, weights: str, vocab_multiple: int) -> Any:
    """Return transformers' GPT-2 with the weights that all trainers begin with.

    Args:
      model: shape.
      weights: safetensors file.
      vocab_multiple: rows of zeros pad the token table to a multiple, as in this project's trainer.
    """
    padded = -(-model.vocab_size // vocab_multiple) * vocab_multiple
    transformers.AttentionInterface.register(ATTENTION, causal_sdpa)
    config = transformers.GPT2Config(
        vocab_size=padded,
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
        attn_implementation=ATTENTION,
    )
    gpt = transformers.GPT2LMHeadModel(config)
    names = {each.flax_name: each.hf_name for each in parameters(model)}
    tensors = {names[name]: tensor for name, tensor in load_file(weights).items()}
    table = tensors["transformer.wte.weight"]
    table = functional.pad(table, (0, 0, 0, padded - len(table)))
    tensors |= {"transformer.wte.weight": table, "lm_head.weight": table}
    gpt.load_state_dict(tensors, strict=True)
    return gpt


def make_optimizer(parameters: list[Any], train: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with a constant rate, which decays matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, fused=True)


class PyTorchSteps:
    """A step of micro-batches, clipped gradients and AdamW.

    Args:
      trainer: what to compile; its variant names a Tuning.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._train, tuning = trainer.train, TUNINGS[trainer.variant or "plain"]
        if trainer.platform == "cpu":  # as this project's trainer has it: PyTorch's buffers are as large
            keep_freed_memory(trainer.model, trainer.train, 1)
        self._device = torch.device("cuda" if trainer.platform == "gpu" else "cpu")
        # On a GPU TensorFloat-32, as JAX does by itself; on a CPU float32 stays float32 on both sides.
        torch.set_float32_matmul_precision("high" if trainer.platform == "gpu" else "highest")
        if tuning.cudnn_attention:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
        gpt = load_gpt2(trainer.model, trainer.weights, self._train.vocab_multiple)
        gpt.to(self._device).train()
        self._parameters = list(gpt.parameters())
        self._optimizer = make_optimizer(self._parameters, self._train)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self._train.precision]
        vocab_size = trainer.model.vocab_size

        def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
                logits = gpt(inputs).logits
            if not tuning.plain_logits:
                logits = logits[..., :vocab_size].float()
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        self._loss = torch.compile(loss_of, mode=tuning.mode)
        self.compile_s: float | None = None

    def start(self, batch: Batch) -> Any:
        """Start a step; the first one compiles, and waits for its end."""
        started = time.perf_counter()
        inputs, targets = (torch.from_numpy(part.astype(np.int64)).to(self._device) for part in batch)
        count = self._train.grad_accum_steps
        total = torch.zeros((), device=self._device)
        for micro in zip(inputs.chunk(count), targets.chunk(count), strict=True):
            loss = self._loss(*micro) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._train.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.compile_s is None:
            float(total)
            self.compile_s = time.perf_counter() - started
        return total

    def peak_bytes(self) -> int:
        """Return the most memory that was allocated on the GPU."""
        return int(torch.cuda.max_memory_allocated())

    def profile(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the JSON object of a StepProfile: kernels by their names, from PyTorch's own profiler.

        Raises:
          ValueError: on a CPU, whose kernels have no names there.
        """
        from jaxgpt_bench.profile.hlo import Program
        from jaxgpt_bench.profile.profile import describe, summarize
        from jaxgpt_bench.profile.trace import Kernel

        if self._device.type == "cpu":
            raise ValueError("PyTorch's kernels are known on a GPU only")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for batch in batches:
                self.start(batch)
            torch.cuda.synchronize()
        kernels = [
            Kernel(event.name, "", 1e3 * event.time_range.start, 1e3 * event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
        program = Program("")
        return summarize(describe(kernels, program, gpu=True), program, len(batches), {}, None, "").to_json()


if __name__ == "__main__":
    serve_steps(PyTorchSteps)
