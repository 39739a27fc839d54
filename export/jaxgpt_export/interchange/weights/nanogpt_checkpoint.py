"""Reading a checkpoint of nanoGPT, minGPT or a trainer like them, and what their two GELUs make of it.

All store GPT-2's names with matrices (O, I). nanoGPT may have no biases (they become zeros) and pads its
vocabulary (the rows are left out). The state dict may lie under another name, and the settings may be an
object. llm.c's .bin files hold the same.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer
from torch import Tensor

from jaxgpt_export.format.tensors import FLOAT32_DTYPE
from jaxgpt_export.interchange.imported_model import (
    ImportedModel,
    Rows,
)
from jaxgpt_export.interchange.weights.inert_pickle import StandIn, attributes
from jaxgpt_export.interchange.weights.llm_c import TOKENS, is_llm_c, read_llm_c
from jaxgpt_export.interchange.weights.weight_files import (
    as_float32,
    check_layout,
    named_tensors,
    plain_names,
    read_weights,
    tie_equal_head,
    trim_vocabulary,
)
from jaxgpt_export.parity.metrics import token_losses

STATE_DICTS = ("model", "state_dict", "model_state_dict", "model_state")  # names of it in a checkpoint
ARGUMENTS = "model_args"  # nanoGPT's, as they stand beside the state dict
SETTINGS = ("config", "args", "model_config", "hparams", "hyper_parameters")  # of others
UNTOLD = ("n_head", "bias", "dropout")  # what tensors do not tell
SHAPE = ("n_layer", "n_embd", "block_size", "vocab_size")


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
    from_llm_c = is_llm_c(path)
    with damaged(path, "give the checkpoint of a GPT-2"):  # a tensor where a number or names should be
        state, arguments, where = read_llm_c(path) if from_llm_c else _parts(read_weights(path), path)
        tensors = as_float32(plain_names(named_tensors(state, path), path), path)
        padded = _shape(tensors, arguments, n_head, where, path)
    if from_llm_c and arguments[TOKENS] != tokenizer.vocab_size:
        raise UserError(
            f"{path}: the model has {arguments[TOKENS]} tokens, the tokenizer {tokenizer.vocab_size}; "
            "give the tokenizer of this model"
        )
    expected = {each.name: (FLOAT32_DTYPE, each.shape) for each in parameters(padded)}
    biases = {each.name: each.shape for each in parameters(padded) if each.part == "bias"}
    if not biases.keys() & tensors.keys() and not arguments.get("bias", False):
        tensors |= {name: np.zeros(shape, np.float32) for name, shape in biases.items()}
        say(f"{path}: the model has no biases; they become zeros")
    check_layout(tensors, expected, path, "(O, I), as nn.Linear does")
    tensors, tied = tie_equal_head(trim_vocabulary(tensors, tokenizer, path))
    config = dataclasses.replace(padded, vocab_size=tokenizer.vocab_size, tied=tied)
    return ImportedModel(path, "llm.c" if from_llm_c else "nanogpt", [path], config, tensors, tokenizer)


def _parts(value: Any, path: Path) -> tuple[Any, dict[str, Any], str]:
    """Find in what a pickle holds the state dict, and what is said of the model beside it.

    Returns:
      The state dict, or what stands in its place; the arguments of the model; and what the file calls them.
      Of others than nanoGPT's model_args only what tensors do not tell is taken: n_head, bias, dropout.
    """
    if isinstance(value, StandIn):
        raise UserError(
            f"{path} holds {value} as a whole, which is not run; save its state dict: "
            "torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(value, Mapping):
        return value, {}, ARGUMENTS
    places = (name for name in STATE_DICTS if name in value and not isinstance(value[name], Tensor))
    state = next((value[name] for name in places), value)
    if value.get(ARGUMENTS):
        arguments = attributes(value[ARGUMENTS])
        if not arguments:
            raise UserError(f"{path}: model_args is {quoted(value[ARGUMENTS])}, expected names and values")
        return state, arguments, ARGUMENTS
    for name in SETTINGS:
        said = attributes(value.get(name))
        if "n_head" in said:
            return state, {key: said[key] for key in UNTOLD if key in said}, name
    return state, {}, ARGUMENTS


def _shape(
    tensors: Arrays, arguments: Mapping[str, Any], n_head: int | None, where: str, path: Path
) -> ModelConfig:
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
    for name in SHAPE:
        if arguments.get(name, found[name]) != found[name]:
            raise UserError(f"{path}: {where} has {name} {arguments[name]!r}, its tensors have {found[name]}")
    said = arguments.get("n_head")
    if n_head is not None and said is not None and n_head != said:
        raise UserError(f"{path}: {where} has n_head {said!r}, --n-head is {n_head}; leave --n-head out")
    heads = said if n_head is None else n_head
    if type(heads) is not int:
        raise UserError(f"{path} does not say how many attention heads it has; give --n-head")
    dropout = arguments.get("dropout", 0.0)
    dropout = float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0
    return ModelConfig(**found, n_head=heads, dropout=dropout, tied="lm_head.weight" not in tensors)
