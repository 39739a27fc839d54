"""A run as a model that can be compared: its layers' inputs and outputs, computed by Flax."""

import contextlib
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxgpt.training.model.fake_quant import (
    INPUT_SCALE,
    FakeQuantEmbed,
    FakeQuantLinear,
    round_inputs,
    round_weight,
)
from jaxgpt.training.model.gpt import GPT, LMHead
from jaxgpt.training.model.numerics import Numerics
from jaxgpt.training.model.params import Params, graph_of, merge
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import open_run
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from jaxgpt_export.flax_run.logits import all_flax_logits


class FlaxModel:
    """A run's best checkpoint, computed by Flax; a `Comparable` of `jaxgpt_export.parity`.

    Args:
      folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        run = open_run(folder)
        self.quantized = run.config.model.qat
        self.name, self._config = str(folder), run.config.model
        self.block_size: int | None = run.config.model.block_size
        self._params = load_params(run, "best")[1]
        self._model = merge(graph_of(self._config), self._params)

    def logits(self, tokens: Integer[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of every position."""
        flat = all_flax_logits(self._config, self._params, tokens.to(torch.int32))
        return flat.view(*tokens.shape, -1)

    def outputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N O"]]:
        """Return what each layer puts out, computed operator by operator."""
        found: dict[str, Tensor] = {}

        def keep(layer: str, arguments: Any, out: Any) -> None:
            found[layer] = as_rows(out)  # the outer of two calls of one layer ends last

        kinds = [(kind, "__call__") for kind in (nnx.Linear, nnx.LayerNorm, nnx.Embed)]
        kinds += [(kind, "__call__") for kind in (FakeQuantLinear, FakeQuantEmbed)]
        found["lm_head"] = as_rows(self._watched(tokens, kinds, keep))
        return found

    def inputs(
        self, tokens: Integer[Tensor, "B T"], float64: bool = False
    ) -> dict[str, Float[Tensor, "N I"]]:
        """Return what enters each linear layer that rounds it; nothing unless the run is with `qat`.

        Args:
          tokens: ids.
          float64: of everything but the integers, which are those of float32.
        """
        found: dict[str, Tensor] = {}

        def keep(layer: str, arguments: Any, out: Any) -> None:
            found[layer] = torch.from_numpy(np.array(arguments[0])).flatten(0, -2)

        methods: list[tuple[type, str]] = [(FakeQuantLinear, "__call__"), (LMHead, "factors")]
        if self.quantized and not float64:
            self._watched(tokens, methods, keep)
        elif self.quantized:
            with jax.enable_x64(True):
                graph = graph_of(self._config, Numerics(jnp.float64, jnp.float64))
                self._watched(tokens, methods, keep, merge(graph, self._as_rounded()))
        return found

    def _as_rounded(self) -> Params:
        """Return float64 parameters whose integers and steps are exactly those of the float32 ones."""
        found = {}
        for name, array in self._params.items():
            kind = name.rpartition(".")[2]
            if kind in ("kernel", "embedding"):
                with jax.enable_x64(False):
                    q, scale = round_weight(array, 0 if kind == "kernel" else 1)
                found[name] = jnp.asarray(np.asarray(q, np.float64) * np.asarray(scale, np.float64))
            else:
                found[name] = jnp.asarray(np.asarray(array, np.float64))
        return found

    def round_input(self, layer: str, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Return the integers that a layer makes of an input, compiled as in training."""
        scale = np.asarray(self._params[f"{layer}.{INPUT_SCALE}"])
        with jax.enable_x64(x.dtype == torch.float64):
            q = jax.jit(round_inputs)(jnp.asarray(x.numpy()), jnp.asarray(scale.astype(x.numpy().dtype)))
            return torch.from_numpy(np.array(q))

    def weight_integers(self, layer: str) -> Int8[Tensor, "O I"]:
        """Return the integers of a layer's weights, compiled as in training."""
        name = ("wte.embedding" if self._config.tied else "lm_head.embedding") if layer == "lm_head" else ""
        kernel = self._params[name or f"{layer}.kernel"]
        q = jax.jit(lambda weight: round_weight(weight, 1 if name else 0)[0])(kernel)
        integers = torch.from_numpy(np.array(q)).to(torch.int8)
        return integers if name else integers.t()

    def _watched(
        self,
        tokens: Integer[Tensor, "B T"],
        methods: Sequence[tuple[type, str]],
        keep: Callable[[str, Any, Any], None],
        other: GPT | None = None,
    ) -> jax.Array:
        """Run the model operator by operator; show the calls of some methods, by layer, as they end."""
        model = self._model if other is None else other
        names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}

        def watched(kind: Any, method: str) -> Any:
            original = getattr(kind, method)

            def call(layer: Any, *arguments: Any) -> Any:
                out = original(layer, *arguments)
                keep(names[id(layer)], arguments, out)
                return out

            return unittest.mock.patch.object(kind, method, call)

        with contextlib.ExitStack() as held:
            held.enter_context(jax.default_matmul_precision("highest"))
            for kind, method in methods:
                held.enter_context(watched(kind, method))
            return model(jnp.asarray(tokens.to(torch.int32).numpy()))

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the weight (O, I) and bias of a layer."""
        found = {}
        for name, array in self._params.items():
            stem, _, leaf = name.rpartition(".")
            if stem == ("wte" if layer == "lm_head" else layer):
                tensor = torch.from_numpy(np.array(array, np.float32))
                found["bias" if leaf == "bias" else "weight"] = tensor.t() if leaf == "kernel" else tensor
        return found


def as_rows(array: Any) -> Float[Tensor, "N O"]:
    return torch.from_numpy(np.array(array, np.float32)).flatten(0, -2)
