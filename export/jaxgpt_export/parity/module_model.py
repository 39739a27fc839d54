"""A PyTorch module whose layers have GPT-2's names, as a model that can be compared."""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxgpt.shared.architecture import BLOCK, HEAD
from jaxgpt.shared.dataset import check_tokens
from jaxtyping import Float, Integer
from torch import Tensor, nn

from jaxgpt_export.model.int8_linear import Int8Linear

# The layers of a GPT-2 under its own names, whatever a library puts before them.
_IN_BLOCK = "|".join(re.escape(layer.name) for layer in BLOCK)
LAYER = re.compile(rf"(?:^|\.)(wte|wpe|h\.\d+\.(?:{_IN_BLOCK})|ln_f|{HEAD})$")


class ModuleModel:
    """A PyTorch module whose layers have GPT-2's names: this project's, transformers', a user's.

    Args:
      module: called with tokens (B, T); gives logits (B, T, V), or an object that has them as `logits`.
      name: for messages.
      folded: its static smoothing is folded into norms and value columns, which then differ on purpose.
    """

    def __init__(self, module: nn.Module, name: str, folded: bool = False) -> None:
        self.name, self._module, self._folded = name, module.eval(), folded
        self._layers = {
            match[1]: layer for path, layer in module.named_modules() if (match := LAYER.search(path))
        }
        config = getattr(module, "config", None)
        self.block_size = getattr(config, "block_size", getattr(config, "n_positions", None))
        self._vocab_size: int | None = getattr(config, "vocab_size", None)
        self.quantized = any(hasattr(layer, "weight_scale") for layer in self._layers.values())

    @torch.inference_mode()
    def logits(self, tokens: Integer[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of every position."""
        if self._vocab_size is not None:
            check_tokens(int(tokens.max()), self._vocab_size, self.name)
        out = self._module(tokens.long())
        return getattr(out, "logits", out)

    def outputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N O"]]:
        """Return what each layer puts out."""
        found: dict[str, Tensor] = {}
        with self._watched(found):
            self.logits(tokens)
        if self._folded:
            found = {name: rows for name, rows in found.items() if ".ln_" not in name and name != "ln_f"}
            for name in [name for name in found if name.endswith("c_attn")]:
                found[name] = found[name][:, : found[name].shape[1] * 2 // 3]  # queries and keys
        return found

    def inputs(
        self, tokens: Integer[Tensor, "B T"], float64: bool = False
    ) -> dict[str, Float[Tensor, "N I"]]:
        """Return what enters each linear layer that rounds it; float64: of all but the integers."""
        if float64:
            module = copy.deepcopy(self._module).double()
            return ModuleModel(module, self.name, self._folded).inputs(tokens)
        found: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            found[name] = x.flatten(0, -2).clone()

        rounding = {name: layer for name, layer in self._layers.items() if isinstance(layer, Int8Linear)}
        handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
            for name, layer in rounding.items()
        ]
        try:
            self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def round_input(self, layer: str, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Return the integers that a layer makes of an input."""
        return cast(Int8Linear, self._layers[layer]).quantize_input(x)[0]

    def weight_integers(self, layer: str) -> Integer[Tensor, "O I"]:
        """Return the integers of a layer's weights."""
        return cast(Int8Linear, self._layers[layer]).integer_weight()

    @contextlib.contextmanager
    def _watched(self, found: dict[str, Tensor]) -> Iterator[None]:
        def keep(name: str, out: Tensor) -> None:
            found[name] = out.detach().reshape(-1, out.shape[-1]).clone()

        handles = [
            layer.register_forward_hook(lambda module, args, out, name=name: keep(name, out))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the float weight (O, I) and bias of a layer."""
        module: Any = self._layers[layer]
        found = {}
        for part in ("weight", "bias"):
            tensor = getattr(module, part, None)
            if isinstance(tensor, Tensor):
                found[part] = tensor.detach()
        if hasattr(module, "weight_scale"):
            found["weight"] = module.float_weight()
        if type(module).__name__ == "Conv1D":  # transformers' linear layers hold (I, O)
            found["weight"] = found["weight"].t()
        return found
