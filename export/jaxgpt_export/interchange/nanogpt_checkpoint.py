"""Reading a checkpoint of nanoGPT or minGPT, and what their two GELUs make of it.

Both store GPT-2's names with matrices (O, I). nanoGPT may have no biases (they become zeros) and pads its
vocabulary (the rows are left out).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt.shared.architecture import HF_PREFIX, parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.format.tensors import FLOAT32_DTYPE
from jaxgpt_export.interchange.imported_model import (
    ImportedModel,
    Rows,
)
from jaxgpt_export.interchange.weight_files import (
    as_float32,
    check_layout,
    named_tensors,
    plain_names,
    read_weights,
    tie_equal_head,
    trim_vocabulary,
)
from jaxgpt_export.parity.metrics import token_losses

PREFIXES = ("_orig_mod.", HF_PREFIX)  # torch.compile's, then GPT-2's
ARGUMENTS = ("n_layer", "n_embd", "block_size", "vocab_size")


def gelu_figures(tokens: npt.NDArray[np.int32], tanh: Rows, erf: Rows) -> dict[str, float]:
    """Return how far the two GELUs lead apart: the largest logit difference, and the loss of each in nats."""

    def loss(rows: Rows) -> float:
        pairs = zip(map(torch.from_numpy, rows), torch.from_numpy(tokens).long(), strict=True)
        each = [token_losses(logits[:-1], row[1:]).sum() for logits, row in pairs]
        return float(torch.stack(each).sum()) / max(tokens[:, 1:].size, 1)

    largest = max(float(abs(a - b).max()) for a, b in zip(tanh, erf, strict=True))
    return {"max_abs_logit_diff": largest, "loss_tanh": loss(tanh), "loss_erf": loss(erf)}


def read_nanogpt(path: Path, tokenizer: Tokenizer, n_head: int | None) -> ImportedModel:
    """Read a checkpoint.

    Args:
      path: the file.
      tokenizer: of the model.
      n_head: attention heads; None takes what the checkpoint says.

    Raises:
      UserError: it is damaged, no GPT-2, or contradicts itself or the options.
    """
    value = read_weights(path)
    arguments: Any = {}
    if isinstance(value, Mapping) and "model" in value:
        value, arguments = value["model"], value.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{path}: model_args is a {type(arguments).__name__}, expected names and values")
    tensors = as_float32(plain_names(named_tensors(value, path), PREFIXES, path), path)
    padded = _shape(tensors, arguments, n_head, path)
    expected = {each.name: (FLOAT32_DTYPE, each.shape) for each in parameters(padded)}
    biases = {each.name: each.shape for each in parameters(padded) if each.part == "bias"}
    if not biases.keys() & tensors.keys() and not arguments.get("bias", False):
        tensors |= {name: np.zeros(shape, np.float32) for name, shape in biases.items()}
        say(f"{path}: the model has no biases; they become zeros")
    check_layout(tensors, expected, path, "(O, I), as nn.Linear does")
    tensors, tied = tie_equal_head(trim_vocabulary(tensors, tokenizer, path))
    config = dataclasses.replace(padded, vocab_size=tokenizer.vocab_size, tied=tied)
    return ImportedModel(path, "nanogpt", [path], config, tensors, tokenizer)


def _shape(tensors: Arrays, arguments: Mapping[str, Any], n_head: int | None, path: Path) -> ModelConfig:
    """Read the shape from the tensors, and the heads from elsewhere; UserError where they disagree."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{path} holds no matrix {name}; is it a checkpoint of nanoGPT or minGPT?")
    (vocab_size, n_embd), block_size = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
    layers = {int(match[1]) for name in tensors if (match := re.match(r"h\.(\d+)\.", name))}
    found: dict[str, Any] = {
        "n_layer": max(layers, default=-1) + 1,
        "n_embd": n_embd,
        "block_size": block_size,
        "vocab_size": vocab_size,
    }
    for name in ARGUMENTS:
        if arguments.get(name, found[name]) != found[name]:
            raise UserError(
                f"{path}: model_args has {name} {arguments[name]!r}, its tensors have {found[name]}"
            )
    said = arguments.get("n_head")
    if n_head is not None and said is not None and n_head != said:
        raise UserError(f"{path}: model_args has n_head {said!r}, --n-head is {n_head}; leave --n-head out")
    heads = said if n_head is None else n_head
    if type(heads) is not int:
        raise UserError(f"{path} does not say how many attention heads it has; give --n-head")
    dropout = arguments.get("dropout", 0.0)
    dropout = float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0
    return ModelConfig(**found, n_head=heads, dropout=dropout, tied="lm_head.weight" not in tensors)
