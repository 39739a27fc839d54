"""GPT-2 in float64, written from its formulas: the yardstick for weights that come from elsewhere.

It shares no line with `model.gpt`, so that a mistake there or in the reading of a layout shows.

    LN(x)   = (x - mean) / sqrt(variance + 1e-5) * weight + bias
    tanh    = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))     GPT-2, minGPT
    erf     = x / 2 (1 + erf(x / sqrt(2)))                          nanoGPT
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

Gelu = Literal["tanh", "erf"]


class Float64GPT:
    """A forward pass over tensors.

    Args:
      tensors: by module name, matrices (O, I); a tied head is left out.
      n_head: attention heads.
      gelu: which of the two formulas.
    """

    def __init__(self, tensors: Mapping[str, Tensor], n_head: int, gelu: Gelu = "tanh") -> None:
        self._tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self._n_head, self._gelu = n_head, gelu

    @torch.inference_mode()
    def __call__(self, tokens: Integer[Tensor, "T"]) -> Float[Tensor, "T V"]:
        """Return the logits of every position of one text."""
        get = self._tensors
        T = len(tokens)
        x = get["wte.weight"][tokens.long()] + get["wpe.weight"][:T]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        index = 0
        while f"h.{index}.ln_1.weight" in get:
            block = f"h.{index}"
            qkv = self._linear(self._norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
            query, key, value = (part.unflatten(1, (self._n_head, -1)) for part in qkv.chunk(3, dim=1))
            scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
            shares = scores.masked_fill(future, -math.inf).softmax(dim=-1)
            mixed = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
            x = x + self._linear(mixed, f"{block}.attn.c_proj")
            inner = self._linear(self._norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            x = x + self._linear(self._activate(inner), f"{block}.mlp.c_proj")
            index += 1
        return self._norm(x, "ln_f") @ get.get("lm_head.weight", get["wte.weight"]).t()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._tensors[f"{name}.weight"].t() + self._tensors[f"{name}.bias"]

    def _activate(self, x: Tensor) -> Tensor:
        if self._gelu == "erf":
            return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
