"""The optimizer: AdamW, or Muon for the blocks' matrices with AdamW for the rest.

Weight decay acts on matrices only (kernels and embeddings, not gains and biases). The learning rate rises
linearly, then falls to `final_lr_fraction` of its peak along a cosine or a line. Input steps of
quantization-aware training move by a share of themselves, so that their size needs no rate of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.shared.config import TrainConfig
from jaxgpt.training.model.fake_quant import INPUT_SCALE
from jaxgpt.training.model.params import Params

Schedule = Callable[[Any], Any]

LARGEST_RELATIVE_STEP = 0.5  # a step that is positive stays so


def schedule(config: TrainConfig, peak: float) -> Schedule:
    """Return the learning rate as a function of the step.

    Args:
      config: warmup_steps, max_steps, final_lr_fraction, lr_schedule.
      peak: highest rate.
    """
    warmup = min(config.warmup_steps, config.max_steps - 1)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    rest = max(config.max_steps - warmup, 1)
    if config.lr_schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_fraction)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_lr_fraction, rest)
    joined: Schedule = optax.join_schedules([rise, fall], [warmup])
    return joined


def parameter_group(name: str) -> str:
    """Classify a parameter by its name.

    Returns:
      "kernel" (a block's matrix), "embedding", "scale" (the step of a layer's rounded input) or "vector".
    """
    last = name.rpartition(".")[2]
    if last == INPUT_SCALE:
        return "scale"
    return last if last in ("kernel", "embedding") else "vector"


def make_optimizer(config: TrainConfig, qat: bool = False) -> optax.GradientTransformation:
    """Return the gradient transformation, clipping included.

    Args:
      config: settings.
      qat: there are input steps. Adam measures their gradients alone, so they neither count for the global
        norm nor are clipped by it.

    Source: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024, Muon (optax.contrib.muon).
    """
    matrix_rate = schedule(config, config.learning_rate)
    other_rate = schedule(config, config.embedding_learning_rate)

    def adamw(rate: Schedule, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, config.beta1, config.beta2, weight_decay=decay)

    if config.optimizer == "muon":
        kernel = optax.contrib.muon(
            matrix_rate, beta=config.momentum, weight_decay=config.weight_decay, mu_dtype=jnp.float32
        )
    else:
        kernel = adamw(matrix_rate, config.weight_decay)
    transforms = {
        "kernel": kernel,
        "embedding": adamw(other_rate, config.weight_decay),
        "vector": adamw(other_rate, 0.0),
    }
    if qat:
        adam = optax.adam(other_rate, config.beta1, config.beta2)
        transforms["scale"] = optax.chain(adam, optax.stateless(_times_parameter))

    def labels(params: Params) -> dict[str, str]:
        return {name: parameter_group(name) for name in params}

    return optax.chain(_clip_all_but_scales(config.grad_clip), optax.multi_transform(transforms, labels))


def _times_parameter(updates: Any, params: Any) -> Any:
    def relative(update: jax.Array, param: jax.Array) -> jax.Array:
        return param * jnp.clip(update, -LARGEST_RELATIVE_STEP, LARGEST_RELATIVE_STEP)

    return jax.tree.map(relative, updates, params)


def _clip_all_but_scales(limit: float) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(limit)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        rest = {name: value for name, value in updates.items() if parameter_group(name) != "scale"}
        clipped, state = clip.update(rest, state, params)
        return {**updates, **clipped}, state

    return optax.GradientTransformation(clip.init, update)
