"""Reading a Hugging Face GPT-2 folder: weights, configuration, tokenizer; and what transformers makes of it.

The weights may be one safetensors file, shards or a pickle, in any float precision, with or without the
prefix `transformer.`. What this program does not compute is refused, never ignored. The head is tied where
its values are the embedding's, which is what transformers goes by.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from jaxgpt.shared.architecture import HEAD, parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json
from jaxgpt.shared.huggingface import MODEL_TYPE, read_hf_config
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, named_tokenizer
from torch import Tensor

from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.format.tensors import FLOAT32_DTYPE, from_hf_layout
from jaxgpt_export.interchange.imported_model import (
    ImportedModel,
    Reference,
)
from jaxgpt_export.interchange.weights.weight_files import (
    as_float32,
    check_layout,
    plain_names,
    read_folder,
    tie_equal_head,
    trim_vocabulary,
)
from jaxgpt_export.parity.models import transformers_model

# A tokenizer is compared with transformers' on this: words, numbers, runs of spaces, controls, scripts.
HARD_TEXT = (
    "Hello  world, it's 2024!\tdef f(x):\n    return x ** 2  # don't\r\n\n\n   \u00a0\u3000 \u2028end   "
    "na\u00efve cafe\u0301 \u65e5\u672c\u8a9e \u0440\u0443\u0441 \u0627\u0644 \u0e44\u0e17 "
    "\u00bd\u0661\u216b \U0001f389\U0001f468\u200d\U0001f469 \x00\x1c\x7f\x85\ufeff'S 'll "
)


def read_hf(folder: Path, tokenizer_name: str | None = None) -> ImportedModel:
    """Read a Hugging Face GPT-2 folder.

    Args:
      folder: to read.
      tokenizer_name: gpt2 or a folder, for one that holds no tokenizer.

    Raises:
      UserError: it is none, is damaged, or computes something else than this program.
    """
    if not folder.is_dir():
        raise UserError(
            f"source folder {folder} is missing; check the path, or write hub:{folder} for the hub"
        )
    said = read_hf_config(folder / "config.json", "model configuration", may_scale_by_layer=True)
    if not said.is_plain:
        raise UserError(f"{folder / 'config.json'} has model_type {said.model_type!r}, expected {MODEL_TYPE}")
    tokenizer = hf_tokenizer(folder, tokenizer_name)
    found, files = read_folder(folder)
    where = files[0] if len(files) == 1 else folder
    tensors = as_float32(plain_names(found, where), where)
    stored_head = f"{HEAD}.weight" in tensors
    tied = said.model.tied and not stored_head
    padded = dataclasses.replace(said.model, dropout=said.dropout, attn_dropout=said.attn_dropout, tied=tied)
    expected = {each.name: (FLOAT32_DTYPE, each.hf_shape) for each in parameters(padded)}
    check_layout(tensors, expected, where, "(I, O), as Conv1D does")
    if said.scales_by_layer:
        _scale_queries(tensors, padded)
    tensors, tied = tie_equal_head(trim_vocabulary(tensors, tokenizer, where))
    if not tied and said.model.tied:
        say(f"{where}: the head is stored and is not the embedding; it stays its own, as in transformers")
    config = dataclasses.replace(padded, vocab_size=tokenizer.vocab_size, tied=tied)
    stored = {each.hf_name: tensors[each.name] for each in parameters(config)}
    read = [folder / "config.json", *files]
    weights, generation = from_hf_layout(stored, config), read_generation_config(folder)
    return ImportedModel(folder, "huggingface", read, config, weights, tokenizer, generation=generation)


def _scale_queries(tensors: Arrays, config: ModelConfig) -> None:
    """Divide the queries of layer i by i + 1, as scale_attn_by_inverse_layer_idx divides its scores q k.

    What is computed stays the same but for float32's rounding of the quotients.
    """
    C = config.n_embd
    for layer in range(1, config.n_layer):
        for part in ("weight", "bias"):
            name = f"h.{layer}.attn.c_attn.{part}"
            scaled = tensors[name].copy()
            scaled[..., :C] /= layer + 1  # (I, O) and (O,), queries first
            tensors[name] = scaled


def hf_tokenizer(folder: Path, other: str | None = None) -> Tokenizer:
    """Read the tokenizer of a folder, or take another one for a folder without any.

    Args:
      folder: of the model.
      other: gpt2 or a folder; None where the folder has its own.

    Raises:
      UserError: there is none, there are two, or it is no byte-level BPE that gives transformers' tokens.
    """
    if other is not None:
        if has_tokenizer(folder):
            raise UserError(f"{folder} has a tokenizer of its own; leave --tokenizer out")
        return named_tokenizer(other)
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} holds no tokenizer; expected vocab.json and merges.txt, or tokenizer.json; give the "
            "one that the model was trained with: --tokenizer gpt2, or --tokenizer FOLDER"
        )
    tokenizer = load_tokenizer(folder, "imported")
    settings = folder / "tokenizer_config.json"
    said = read_json(settings, "tokenizer settings") if settings.exists() else {}
    if tokenizer.layout.works_as_gpt2 or said.get("tokenizer_class"):
        _check_against_transformers(tokenizer, folder)
    else:
        say(
            f"{settings} names no tokenizer_class: tokenizer.json decides how text is split (transformers 5 "
            "would split it as GPT-2 does); the artifact says PreTrainedTokenizerFast"
        )
    return tokenizer


def _check_against_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise UserError where transformers, if it is installed, reads a hard text otherwise."""
    if importlib.util.find_spec("transformers") is None:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    config = read_json(folder / "config.json", "model configuration")
    # Auto classes go by model_type; a folder without one is a GPT-2's, as read_hf_config has found.
    kind: Any = transformers.AutoTokenizer if "model_type" in config else transformers.GPT2Tokenizer
    text = HARD_TEXT + " x".join(["", *tokenizer.special_tokens, *tokenizer.special_tokens])
    try:
        theirs = kind.from_pretrained(folder, local_files_only=True)(text).input_ids
    except Exception as error:  # whatever its classes and the Rust library raise on a file
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"transformers can't load the tokenizer of {folder} ({line}); fetch it again"
        ) from None
    if list(theirs) != tokenizer.encode(text, special=True):
        raise UserError(
            f"the tokenizer of {folder} gives other tokens in transformers than here; save it anew with "
            "transformers' PreTrainedTokenizerFast"
        )


def transformers_reference(folder: Path, vocab_size: int) -> Reference:
    """Return transformers' reading of a folder, in float32."""
    model = transformers_model(folder)

    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        return model(tokens[None].long()).logits[0, :, :vocab_size].clone()

    return logits
