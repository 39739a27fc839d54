"""The optimizer of a training: one for the blocks' matrices, AdamW for everything else, clipping before both.

Weight decay acts on matrices only (kernels and embeddings, not gains and biases). The scales of inputs that
quantization-aware training learns move by a share of themselves, so that their size needs no rate of its own.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.training.lr_schedule import schedule
from jaxgpt.training.model.fake_quant import INPUT_SCALE
from jaxgpt.training.model.params import Params
from jaxgpt.training.optimizers import find_optimizer

MAX_RELATIVE_UPDATE = 0.5  # a scale that is positive stays so
# The table's group of a parameter -> the label of its transformation, which checkpoints name its state by.
LABELS = {"matrix": "kernel", "embedding": "embedding", "vector": "vector"}
SCALE = "scale"


def parameter_labels(model: ModelConfig) -> dict[str, str]:
    """Return the label of each parameter's transformation, by Flax name; of all but scales of inputs."""
    return {each.flax_name: LABELS[each.group] for each in parameters(model)}


def make_optimizer(
    config: TrainConfig, model: ModelConfig, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return the gradient transformation, clipping included.

    Args:
      config: settings.
      model: shape. With qat there are scales of inputs: Adam measures their gradients alone, so they neither
        count for the global norm nor are clipped by it.
      mesh: devices that share the optimizer's work, of `fsdp` or of one CPU; None where each does all of it.
    """
    matrix_rate = schedule(config, config.learning_rate)
    other_rate = schedule(config, config.embedding_learning_rate)

    def adamw(decay: float) -> optax.GradientTransformation:
        return optax.adamw(other_rate, config.beta1, config.beta2, weight_decay=decay)

    of_matrices = find_optimizer(config.optimizer).matrices
    more = {"mesh": mesh} if "mesh" in inspect.signature(of_matrices).parameters else {}
    transforms: dict[str, optax.GradientTransformation] = {
        "kernel": of_matrices(config, matrix_rate, **more),
        "embedding": adamw(config.weight_decay),
        "vector": adamw(0.0),
    }
    if model.qat:
        adam = optax.adam(other_rate, config.beta1, config.beta2)
        transforms[SCALE] = optax.chain(adam, optax.stateless(_times_parameter))
    known = parameter_labels(model)

    def labels(params: Params) -> dict[str, str]:
        return {name: SCALE if name.endswith(INPUT_SCALE) else known[name] for name in params}

    return optax.chain(_clip_all_but_scales(config.grad_clip), optax.multi_transform(transforms, labels))


def _times_parameter(updates: Any, params: Any) -> Any:
    def relative(update: jax.Array, param: jax.Array) -> jax.Array:
        return param * jnp.clip(update, -MAX_RELATIVE_UPDATE, MAX_RELATIVE_UPDATE)

    return jax.tree.map(relative, updates, params)


def _clip_all_but_scales(limit: float) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(limit)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        rest = {name: value for name, value in updates.items() if not name.endswith(INPUT_SCALE)}
        clipped, state = clip.update(rest, state, params)
        return {**updates, **clipped}, state

    return optax.GradientTransformation(clip.init, update)
