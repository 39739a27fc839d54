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
from jaxgpt.shared.architecture import Parameter, linear_layers, parameters
from jaxgpt.shared.dataset import check_tokens
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
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from jaxgpt_export.flax_run.checkpoint import flax_logits, read_checkpoint


class FlaxModel:
    """A run's best checkpoint, computed by Flax; a `Comparable` of `jaxgpt_export.parity`.

    Args:
      folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        checkpoint = read_checkpoint(folder, "best")
        self.quantized = checkpoint.fake_quantized
        self.name, self._config = str(folder), checkpoint.run.config.model
        self.block_size: int | None = self._config.block_size
        self._params = checkpoint.params
        self._model = merge(graph_of(self._config), self._params)

    def logits(self, tokens: Integer[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of every position."""
        check_tokens(int(tokens.max()), self._config.vocab_size, self.name)
        flat = flax_logits(self._config, self._params, tokens.to(torch.int32).numpy())
        return torch.from_numpy(flat).view(*tokens.shape, -1)

    def outputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N O"]]:
        """Return what each layer puts out, computed operator by operator."""
        found: dict[str, Tensor] = {}

        def keep(layer: str, arguments: Any, out: Any) -> None:
            found[layer] = _as_rows(out)  # the outer of two calls of one layer ends last

        kinds = [(kind, "__call__") for kind in (nnx.Linear, nnx.LayerNorm, nnx.Embed)]
        kinds += [(kind, "__call__") for kind in (FakeQuantLinear, FakeQuantEmbed)]
        found["lm_head"] = _as_rows(self._watched(tokens, kinds, keep))
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

        methods: list[tuple[type, str]] = [(FakeQuantLinear, "__call__"), (LMHead, "operands")]
        if self.quantized and not float64:
            self._watched(tokens, methods, keep)
        elif self.quantized:
            with jax.enable_x64(True):
                graph = graph_of(self._config, Numerics(jnp.float64, jnp.float64))
                self._watched(tokens, methods, keep, merge(graph, self._as_rounded()))
        return found

    def _as_rounded(self) -> Params:
        """Return float64 parameters whose integers and scales are exactly those of the float32 ones."""
        axes = {each.flax_name: _input_axis(each) for each in parameters(self._config) if len(each.shape) > 1}
        found = {}
        for name, array in self._params.items():
            exact = np.asarray(array, np.float64)
            if name in axes:
                with jax.enable_x64(False):
                    q, scale = round_weight(array, axes[name])
                exact = np.asarray(q, np.float64) * np.asarray(scale, np.float64)
            found[name] = jnp.asarray(exact)
        return found

    def round_input(self, layer: str, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Return the integers that a layer makes of an input, compiled as in training."""
        scale = np.asarray(self._params[f"{layer}.{INPUT_SCALE}"])
        with jax.enable_x64(x.dtype == torch.float64):
            q = jax.jit(round_inputs)(jnp.asarray(x.numpy()), jnp.asarray(scale.astype(x.numpy().dtype)))
            return torch.from_numpy(np.array(q))

    def weight_integers(self, layer: str) -> Int8[Tensor, "O I"]:
        """Return the integers of a layer's weights, compiled as in training."""
        weight = self._parameters(layer)["weight"]
        axis = _input_axis(weight)
        q = jax.jit(lambda array: round_weight(array, axis)[0])(self._params[weight.flax_name])
        integers = torch.from_numpy(np.array(q)).to(torch.int8)
        return integers.t() if weight.transposed else integers

    def _parameters(self, layer: str) -> dict[str, Parameter]:
        """Return the parameters that a layer computes with, by part."""
        linear = linear_layers(self._config)
        owner = linear[layer].matrix if layer in linear else layer
        return {each.part: each for each in parameters(self._config) if each.layer.name == owner}

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
        for part, parameter in self._parameters(layer).items():
            tensor = torch.from_numpy(np.array(self._params[parameter.flax_name], np.float32))
            found[part] = tensor.t() if parameter.transposed else tensor
        return found


def _input_axis(parameter: Parameter) -> int:
    """Return the axis of a Flax matrix along which a row's inputs lie."""
    return 0 if parameter.transposed else 1


def _as_rows(array: Any) -> Float[Tensor, "N O"]:
    return torch.from_numpy(np.array(array, np.float32)).flatten(0, -2)
