"""Logits of a run's checkpoint, computed by Flax."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import torch
from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.fake_quant import without_scales
from jaxgpt.training.model.params import Params, graph_of, merge
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import open_run
from jaxtyping import Float, Int32
from torch import Tensor

from jaxgpt_export.format.probe import Probe


def all_flax_logits(
    config: ModelConfig, params: Params, tokens: Int32[Tensor, "B T"]
) -> Float[Tensor, "N V"]:
    """Return the Flax logits of every position, flattened."""
    graph = graph_of(config)
    forward = jax.jit(lambda params, tokens: merge(graph, params)(tokens))
    with jax.default_matmul_precision("highest"):
        rows = [np.asarray(forward(params, row[None].numpy()))[0] for row in tokens]
    return torch.from_numpy(np.concatenate(rows))


def flax_logits(run_folder: Path, step: int, probe: Probe, rounded: bool = False) -> Float[Tensor, "P V"]:
    """Recompute the Flax logits of a probe from its run; UserError when the step is no longer stored.

    Args:
      run_folder: the run.
      step: of the checkpoint.
      probe: whose tokens and positions are taken.
      rounded: as quantization-aware training computes them, where the run is one.
    """
    run = open_run(run_folder)
    _, params = load_params(run, str(step))
    model = run.config.model
    if not rounded:
        model, params = dataclasses.replace(model, qat=False), without_scales(params)
    return all_flax_logits(model, params, probe.tokens)[probe.positions]
