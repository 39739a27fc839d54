"""Reading a Hugging Face GPT-2 folder: weights, configuration, tokenizer; and what transformers makes of it.

The weights may be one safetensors file, shards or a pickle, in any float precision, with or without the
prefix `transformer.`. What this program does not compute is refused, never ignored. The head is tied where
its values are the embedding's, which is what transformers goes by.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxgpt.shared.architecture import HEAD, HF_PREFIX, parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json
from jaxgpt.shared.huggingface import MODEL_TYPE, read_hf_config
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import ENDOFTEXT, Tokenizer, load_tokenizer, parse_merges
from safetensors import SafetensorError
from torch import Tensor

from jaxgpt_export.format.tensors import FLOAT32_DTYPE, from_hf_layout
from jaxgpt_export.interchange.imported_model import (
    ImportedModel,
    Reference,
)
from jaxgpt_export.interchange.weight_files import (
    as_float32,
    check_layout,
    plain_names,
    read_folder,
    tie_equal_head,
    trim_vocabulary,
)


def read_hf(folder: Path) -> ImportedModel:
    """Read a Hugging Face GPT-2 folder.

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
    tokenizer = hf_tokenizer(folder)
    found, files = read_folder(folder)
    where = files[0] if len(files) == 1 else folder
    tensors = as_float32(plain_names(found, (HF_PREFIX,), where), where)
    stored_head = f"{HEAD}.weight" in tensors
    padded = dataclasses.replace(said.model, dropout=said.dropout, tied=said.model.tied and not stored_head)
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
    return ImportedModel(folder, "huggingface", read, config, from_hf_layout(stored, config), tokenizer)


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


def hf_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer: vocab.json with merges.txt, else tokenizer.json.

    Raises:
      UserError: there is none, or it is no byte-level BPE in GPT-2's layout.
    """
    settings = folder / "tokenizer_config.json"
    if settings.exists() and read_json(settings, "tokenizer settings").get("add_prefix_space"):
        raise UserError(f"{settings} has add_prefix_space true; GPT-2's tokenizer adds no space")
    if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
        return load_tokenizer(folder, "imported")
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder} holds no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    value = read_json(path, "tokenizer")
    with damaged(path, "fetch it again"):
        return _from_tokenizer_json(value, path)


def _from_tokenizer_json(value: dict[str, Any], path: Path) -> Tokenizer:
    model, before = value["model"], value.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or before.get("type") != "ByteLevel":
        raise UserError(
            f"{path} is {model.get('type')} after {before.get('type')}; GPT-2's is BPE after ByteLevel"
        )
    other = [
        name
        for name, differs in {
            "normalizer": value.get("normalizer"),
            "add_prefix_space": before.get("add_prefix_space"),
            "use_regex false": not before.get("use_regex", True),
            "continuing_subword_prefix": model.get("continuing_subword_prefix"),
            "end_of_word_suffix": model.get("end_of_word_suffix"),
            "ignore_merges": model.get("ignore_merges"),
        }.items()
        if differs
    ]
    if other:
        raise UserError(f"{path} has {', '.join(other)}; GPT-2's tokenizer has none of these")
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(parse_merges("\n".join(lines), path), "imported")
    added = {entry["content"]: entry["id"] for entry in value.get("added_tokens") or []}
    if {**model["vocab"], **added} != tokenizer.vocab():
        raise UserError(
            f"{path}: its vocabulary is not in GPT-2's layout (256 bytes in its order, one token a merge, "
            f"{ENDOFTEXT} last); a model of another vocabulary can't be imported"
        )
    return tokenizer


def transformers_reference(folder: Path, vocab_size: int) -> Reference:
    """Return transformers' reading of a folder, in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"transformers can't load {folder} ({line})") from None
    model.eval()

    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        return model(tokens[None].long()).logits[0, :, :vocab_size].clone()

    return logits
