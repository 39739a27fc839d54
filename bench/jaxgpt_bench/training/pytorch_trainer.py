"""transformers' GPT-2, timed: torch.compile, SDPA and a fused AdamW.

    python -m jaxgpt_bench.training.pytorch_trainer '{"engine": "pytorch", "devices": 1, "model": {...}, ...}'

is what the bench starts (see common/workers.py).
"""

from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt_bench.training.trainer import Batch, Step, Trainer, serve_steps


def load_gpt2(model: ModelConfig, weights: str) -> Any:
    """Return transformers' GPT-2 with the weights that all trainers begin with."""
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
    names = {each.flax_name: each.hf_name for each in parameters(model)}
    tensors = {names[name]: tensor for name, tensor in load_file(weights).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
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


def make_step(trainer: Trainer) -> Step:
    """Return a step: micro-batches, clipped gradients, AdamW."""
    train = trainer.train
    device = torch.device("cuda" if trainer.platform == "gpu" else "cpu")
    # On a GPU TensorFloat-32, as JAX does by itself; on a CPU float32 stays float32 on both sides.
    torch.set_float32_matmul_precision("high" if trainer.platform == "gpu" else "highest")
    gpt = load_gpt2(trainer.model, trainer.weights)
    gpt.to(device).train()
    parameters = list(gpt.parameters())
    optimizer = make_optimizer(parameters, train)
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


if __name__ == "__main__":
    serve_steps(make_step, lambda: int(torch.cuda.max_memory_allocated()))
