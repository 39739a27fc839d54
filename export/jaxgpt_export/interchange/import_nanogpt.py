"""`jaxgpt-export import-nanogpt`: a nanoGPT or minGPT checkpoint -> a float32 artifact.

    jaxgpt-export import-nanogpt --source ckpt.pt --tokenizer gpt2|FOLDER --out ART [--n-head N]

Both store GPT-2's names with matrices (O, I). nanoGPT may have no biases (they become zeros) and pads its
vocabulary (the rows are left out). It computes GELU by erf, this program and minGPT by tanh: what that
changes is measured and said, and nothing can be done about it but a little training.
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
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from torch.nn import functional as F

from jaxgpt_export.format.certificate import versions
from jaxgpt_export.format.tensors import FLOAT32_DTYPE
from jaxgpt_export.interchange.float64_gpt import Float64GPT
from jaxgpt_export.interchange.imported_model import (
    ImportedModel,
    Rows,
    certify_and_write,
    choose_tokens,
    rows_of,
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
from jaxgpt_export.model.build import as_tensors

PREFIXES = ("_orig_mod.", HF_PREFIX)  # torch.compile's, then GPT-2's
ARGUMENTS = ("n_layer", "n_embd", "block_size", "vocab_size")


@dataclasses.dataclass(frozen=True)
class ImportNanogptOptions:
    """Turn a nanoGPT or minGPT checkpoint into a float32 artifact.

    Attributes:
      source: ckpt.pt of nanoGPT, a state dict of minGPT, or a .safetensors file with the same names.
      tokenizer: gpt2, or a folder with vocab.json and merges.txt (an artifact, a data set).
      out: the artifact folder to write.
      n_head: attention heads; needed where the checkpoint has no model_args, as tensors do not tell.
      data: dataset folder whose validation split is compared on; random tokens if not given.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    source: Path
    tokenizer: str
    out: Path
    n_head: int | None = None
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def import_nanogpt(options: ImportNanogptOptions) -> Result:
    """Run `jaxgpt-export import-nanogpt`; exit code 1, and no artifact, when the logits differ."""
    inputs = [options.source, *([options.data] if options.data else [])]
    if options.tokenizer != "gpt2":
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    model = read_nanogpt(options.source, _tokenizer(options.tokenizer), options.n_head)
    tokens, text = choose_tokens(model, options.data)
    tanh, erf = (
        rows_of(Float64GPT(as_tensors(model.tensors), model.config.n_head, gelu), tokens)
        for gelu in ("tanh", "erf")
    )
    gelu = gelu_figures(tokens, tanh, erf)
    say(
        f"GELU: this program computes it by tanh, as minGPT does; nanoGPT by erf. If this model was trained "
        f"with erf, its logits change by at most {gelu['max_abs_logit_diff']:.2e} and its loss from "
        f"{gelu['loss_erf']:.5f} to {gelu['loss_tanh']:.5f} nats (on {text})"
    )
    figures = {"probe": text, "gelu": gelu}
    against = "a float64 forward pass with tanh GELU"
    used = versions("torch", "safetensors")
    return certify_and_write(model, tokens, tanh, against, used, options.out, options.overwrite, figures)


def gelu_figures(tokens: npt.NDArray[np.int32], tanh: Rows, erf: Rows) -> dict[str, float]:
    """Return how far the two GELUs lead apart: the largest logit difference, and the loss of each in nats."""

    def loss(rows: Rows) -> float:
        pairs = zip(map(torch.from_numpy, rows), torch.from_numpy(tokens).long(), strict=True)
        each = [F.cross_entropy(logits[:-1], row[1:], reduction="sum") for logits, row in pairs]
        return float(torch.stack(each).sum()) / max(tokens[:, 1:].size, 1)

    largest = max(float(abs(a - b).max()) for a, b in zip(tanh, erf, strict=True))
    return {"max_abs_logit_diff": largest, "loss_tanh": loss(tanh), "loss_erf": loss(erf)}


def _tokenizer(name: str) -> Tokenizer:
    if name == "gpt2":
        from jaxgpt.shared.gpt2_tokenizer import gpt2_tokenizer

        return gpt2_tokenizer()
    if not Path(name).is_dir():
        raise UserError(f"tokenizer {name!r} is neither gpt2 nor a folder with vocab.json and merges.txt")
    return load_tokenizer(Path(name), "imported")


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
