"""The artifact folder: a model that travels.

    config.json              shape, and for quantized artifacts the section `quantization`
    model.safetensors        the tensors
    tokenizer.json  vocab.json  merges.txt  generation_config.json
    certificate.json         where it came from and what was measured; see certificate.py
    probe.safetensors        tokens and the logits of the run they came from; see certificate.py

A float32 artifact IS a Hugging Face GPT-2 folder: names `transformer.h.0.attn.c_attn.weight`, Conv1D
layout (I, O), a tied head not stored. One with rotary positions has the same names and layout, no wpe,
"positions": "rotary" and model_type "jaxgpt_gpt2", so that other loaders refuse it instead of reading it
wrongly. A quantized artifact has that model_type too, the plain names (`h.0.attn.c_attn.weight`), rows
first (O, I), and a section `quantization`: see quantization.py. One of a quantization-aware training has

    qat.safetensors          NAME.input_scale, the trained step of each linear layer's input, and `logits`,
                             those of the probe as the training computed them, rounded

Nothing is pickled.
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxgpt.shared.config import ModelConfig, Positions
from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.files import read_json, write_json
from jaxgpt.shared.huggingface import FIXED_SETTINGS, OWN_MODEL_TYPE, PREFIX, SHAPE_FIELDS
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jaxgpt_export.format.certificate import TRAINED_FILE, altered_files, read_certificate
from jaxgpt_export.format.scheme import HEAD, Quantization, linear_layers, read_quantization
from jaxgpt_export.format.tensors import Shapes, quantized_shapes
from jaxgpt_export.model.build import quantized_model
from jaxgpt_export.model.gpt import EMBEDDINGS, GPT, PARTS, float_model, layer_shapes, norm_names

CONV1D_SUFFIXES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact folder that was read and checked.

    Attributes:
      folder: where it lies.
      config: shape.
      quantization: None for float32.
      tensors: by module name, matrices (O, I), whatever the file's layout.
      trained: what qat.safetensors holds; empty without one.
    """

    folder: Path
    config: ModelConfig
    quantization: Quantization | None
    tensors: Tensors
    trained: Tensors = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Row name in reports without the engine: fp32, int8-dynamic, int4-weight-only, ..."""
        return "fp32" if self.quantization is None else self.quantization.kind

    @property
    def input_scales(self) -> Tensors:
        """The input step that a quantization-aware training learned for each linear layer; else empty."""
        end = ".input_scale"
        return {name.removesuffix(end): step for name, step in self.trained.items() if name.endswith(end)}

    @property
    def file_bytes(self) -> int:
        """Size of model.safetensors."""
        return (self.folder / "model.safetensors").stat().st_size

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
          UserError: it is damaged, or its vocabulary is not the model's.
        """
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.vocab_size != self.config.vocab_size:
            raise UserError(
                f"tokenizer of {self.folder} has {tokenizer.vocab_size} tokens, the model "
                f"{self.config.vocab_size}; the folder mixes two models"
            )
        return tokenizer

    def model(self) -> GPT:
        """Build the PyTorch module."""
        if self.quantization is None:
            return float_model(self.config, self.tensors)
        return quantized_model(self.config, self.quantization, self.tensors)


def load(folder: str | Path) -> GPT:
    """Return the module of an artifact folder; `model(tokens)` gives logits (B, T, V).

    Raises:
      UserError: the folder is no artifact, or a tensor is missing, extra, wrongly shaped or not finite.
    """
    return read_artifact(Path(folder)).model()


def read_artifact(folder: Path) -> Artifact:
    """Read an artifact folder and check every tensor; UserError names what does not fit."""
    if not folder.is_dir():
        raise UserError(f"artifact folder {folder} is missing; make one with: jaxgpt-export convert")
    path = folder / "config.json"
    value = read_json(path, "artifact configuration")
    plain = _is_plain(value, path)
    missing = [theirs for theirs in SHAPE_FIELDS.values() if theirs not in value]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is it the folder of an artifact?")
    shape = {ours: value[theirs] for ours, theirs in SHAPE_FIELDS.items()}
    for ours, number in shape.items():
        if type(number) is not int:
            raise UserError(f"{path} has {SHAPE_FIELDS[ours]} {quoted(number)}, expected a whole number")
    tied = value.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path} has tie_word_embeddings {quoted(tied)}, expected true or false")
    positions = value.get("positions", "learned")
    if positions not in get_args(Positions):
        raise UserError(f"{path} has positions {quoted(positions)}, expected learned or rotary")
    config = ModelConfig(**shape, positions=positions, tied=tied)
    quantization = None if plain else read_quantization(value.get("quantization"), config, path)
    for name, only in FIXED_SETTINGS.items():
        if value.get(name, only) != only:
            raise UserError(f"{path} has {name} {quoted(value[name])}; this program computes {only!r} only")
    tensors = _read_tensors(folder / "model.safetensors")
    check_tensors(tensors, expected_tensors(config, quantization), folder / "model.safetensors")
    if quantization is None:
        tensors = {from_hf_name(name): from_hf_layout(name, tensor) for name, tensor in tensors.items()}
    return Artifact(folder, config, quantization, tensors, _read_trained(folder / TRAINED_FILE, config))


def _is_plain(value: dict[str, Any], path: Path) -> bool:
    """Whether a config.json is of a float32 artifact; UserError when it is of something else altogether."""
    kind = value.get("model_type")
    if kind == "gpt2" and "positions" not in value:
        return True
    if kind != OWN_MODEL_TYPE:
        raise UserError(f"{path} has model_type {quoted(kind)}, expected gpt2 or {OWN_MODEL_TYPE}")
    return value.get("positions") == "rotary" and value.get("quantization") is None


def _read_trained(path: Path, config: ModelConfig) -> Tensors:
    if not os.path.lexists(path):
        return {}
    tensors = _read_tensors(path)
    expected: Shapes = {f"{name}.input_scale": (torch.float32, ()) for name in linear_layers(config)}
    rows = tensors["logits"].shape[:1] if "logits" in tensors else (0,)
    expected["logits"] = (torch.float32, (*rows, config.vocab_size))
    check_tensors(tensors, expected, path)
    return tensors


def _read_tensors(path: Path) -> Tensors:
    if not path.exists():
        raise UserError(f"{path} is missing; convert or quantize again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}); it was truncated or altered"
        ) from None


def expected_tensors(config: ModelConfig, quantization: Quantization | None) -> Shapes:
    """Return dtype and shape of every tensor that model.safetensors must hold, by its name there."""
    if quantization is not None:
        return quantized_shapes(config, quantization)
    expected: Shapes = {}
    for name in norm_names(config):
        for part in PARTS:
            expected[to_hf_name(f"{name}.{part}")] = (torch.float32, (config.n_embd,))
    for name, (O, I) in layer_shapes(config).items():
        conv1d = name not in (*EMBEDDINGS, HEAD)
        if conv1d:
            expected[to_hf_name(f"{name}.bias")] = (torch.float32, (O,))
        expected[to_hf_name(f"{name}.weight")] = (torch.float32, (I, O) if conv1d else (O, I))
    return expected


def check_tensors(
    tensors: Tensors, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]], where: Path
) -> None:
    """Compare tensors with what is expected.

    Raises:
      UserError: names every missing and extra tensor, else the first of wrong dtype or shape or with NaN
        or infinity.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{where}: missing tensors: {', '.join(missing) or 'none'}; "
            f"unexpected tensors: {', '.join(extra) or 'none'}; it does not fit its config.json"
        )
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise UserError(
                f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}"
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(f"{where}: {name} holds NaN or infinity; the file or its training is damaged")
        if tensor.dtype == torch.int8 and tensor.numel() and int(tensor.detach().numpy().min()) == -128:
            raise UserError(f"{where}: {name} holds -128, which no artifact has; the file is damaged")
        if name.endswith(("_scale", ".smooth")) and not _are_steps(tensor):
            which = "of 0" if dtype == torch.bfloat16 else "that is not positive"
            raise UserError(f"{where}: {name} holds a step {which}; the file is damaged")


# numpy where it has the type: of PyTorch's operators 3 MB of code would stay in memory.
def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bfloat16:
        return bool(torch.isfinite(tensor).all())
    return bool(np.isfinite(tensor.detach().numpy()).all())


def _are_steps(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bfloat16:  # of 4-bit weights, with a sign
        return bool((tensor.abs() > 0).all())
    return bool((tensor.detach().numpy() > 0).all())


def to_hf_name(name: str) -> str:
    """Return Hugging Face's name of a module's tensor."""
    return name if name.startswith(HEAD) else PREFIX + name


def from_hf_name(name: str) -> str:
    """Return the module's name of a tensor of a Hugging Face GPT-2 file."""
    return name.removeprefix(PREFIX)


def from_hf_layout(name: str, tensor: Tensor) -> Tensor:
    """Turn a Conv1D weight (I, O) into (O, I); others stay."""
    return tensor.t().contiguous() if name.endswith(CONV1D_SUFFIXES) else tensor


def write_artifact(
    folder: Path,
    config: ModelConfig,
    quantization: Quantization | None,
    tensors: Tensors,
    tokenizer: Tokenizer,
) -> None:
    """Write everything but certificate and probe into a folder (a temporary one; see files.new_folder).

    Args:
      folder: exists.
      config: shape.
      quantization: None for float32.
      tensors: by their names in the file (see `expected_tensors`), which they must match.
      tokenizer: of the model.
    """
    check_tensors(tensors, expected_tensors(config, quantization), folder / "model.safetensors")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_json(config, quantization, tokenizer.endoftext))
    ids = {"bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.endoftext}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    tokenizer.save(folder)


def config_json(config: ModelConfig, quantization: Quantization | None, endoftext: int) -> dict[str, Any]:
    """Return config.json: Hugging Face's GPT-2 fields, with our own model_type when quantized."""
    value: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "initializer_range": 0.02,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        **FIXED_SETTINGS,
        "tie_word_embeddings": config.tied,
        "bos_token_id": endoftext,
        "eos_token_id": endoftext,
        "dtype": "float32",
    }
    if config.positions != "learned":
        value["positions"] = config.positions
    if config.positions != "learned" or quantization is not None:
        value["architectures"] = ["JaxgptGPT2"]
        value["model_type"] = OWN_MODEL_TYPE
    if quantization is not None:
        value["quantization"] = quantization.to_json()
        del value["dtype"]
    return json.loads(json.dumps(value))


def read_whole_artifact(folder: Path) -> Artifact:
    """Read an artifact, and refuse one whose files are not those that its certificate names.

    Raises:
      UserError: see read_artifact; or a file was altered.
    """
    with ThreadPoolExecutor(1) as aside:  # hashing takes as long as all the rest, on another core
        hashed = aside.submit(_altered, folder)
        artifact = read_artifact(folder)
        altered = hashed.result()
    if altered:
        raise UserError(
            f"{folder}: {', '.join(altered)} changed since certificate.json was written; "
            "restore it, or convert or quantize again"
        )
    return artifact


def _altered(folder: Path) -> list[str]:
    if not os.path.lexists(folder / "certificate.json"):  # a link to nowhere is a certificate that is lost
        return []
    return altered_files(folder, read_certificate(folder))
