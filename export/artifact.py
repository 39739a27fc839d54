"""The artifact folder: a model that travels.

    config.json              shape, and for quantized artifacts the section `quantization`
    model.safetensors        the tensors
    tokenizer.json  vocab.json  merges.txt  generation_config.json
    certificate.json         where it came from and what was measured; see certificate.py
    probe.safetensors        tokens and the logits of the run they came from; see certificate.py

A float32 artifact IS a Hugging Face GPT-2 folder: names `transformer.h.0.attn.c_attn.weight`, Conv1D
layout (I, O), tied head not stored. One with rotary positions has the same names and layout, no wpe,
"positions": "rotary" and model_type "jaxgpt_gpt2", so that other loaders refuse it instead of reading it
wrongly. A quantized artifact has that model_type too, the plain names (`h.0.attn.c_attn.weight`), rows
first (O, I), and

    quantization.format_version    1
    quantization.method            dynamic | static (more to come)
    quantization.weight_bits       8 (4 is reserved)
    quantization.group_size        0: one step a row (groups of input channels are reserved)
    quantization.smooth            names of the layers that have a smoothing vector

    NAME.weight         (O, I) int8        wte, wpe and the four matrices of each block
    NAME.weight_scale   (O,) float32
    NAME.input_scale    () float32         static input; also lm_head.input_scale
    NAME.smooth         (I,) float32       by which the input is divided (wte: by which rows are divided)
    NAME.bias, ln_*     float32

The head has no tensor but its input_scale: it is wte.weight. For 4 bits `NAME.weight_packed`
(O, I / 2) uint8 and `NAME.weight_scale` (O, I / group_size) are reserved. `export.arithmetic` says what
the numbers mean. Nothing is pickled.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxgpt.config import ModelConfig
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json, write_json
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export.layers import Int8Embedding, Int8Linear
from export.model import GPT, float_model, layer_shapes, norm_names

OWN_MODEL_TYPE = "jaxgpt_gpt2"
QUANTIZATION_FORMAT_VERSION = 1
EMBEDDINGS = ("wte", "wpe")
CONV1D_SUFFIXES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
HF_PREFIX = "transformer."

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The section `quantization` of config.json.

    Attributes:
      method: dynamic or static.
      smooth: layers with a smoothing vector, in order.
    """

    method: str
    smooth: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "format_version": QUANTIZATION_FORMAT_VERSION,
            "method": self.method,
            "weight_bits": 8,
            "group_size": 0,
            "smooth": list(self.smooth),
        }


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact folder that was read and checked.

    Attributes:
      folder: where it lies.
      config: shape.
      quantization: None for float32.
      tensors: by module name, matrices (O, I), whatever the file's layout.
    """

    folder: Path
    config: ModelConfig
    quantization: Quantization | None
    tensors: Tensors

    @property
    def kind(self) -> str:
        """Row name in reports without the engine: fp32, int8-dynamic or int8-static."""
        return "fp32" if self.quantization is None else f"int8-{self.quantization.method}"

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
        return int8_model(self.config, self.tensors)


# What every artifact computes; another value in a config.json would be ignored, so it is refused.
FIXED_SETTINGS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


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
    quantization = _read_quantization(value, path)
    names = {
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    }
    missing = [theirs for theirs in names.values() if not isinstance(value.get(theirs), int)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is it the folder of an artifact?")
    shape = {ours: value[theirs] for ours, theirs in names.items()}
    config = ModelConfig(**shape, positions=value.get("positions", "learned"))
    for name, only in FIXED_SETTINGS.items():
        if value.get(name, only) != only:
            raise UserError(f"{path} has {name} {value[name]!r}; this program computes {only!r} only")
    tensors = _read_tensors(folder / "model.safetensors")
    check_tensors(tensors, expected_tensors(config, quantization), folder / "model.safetensors")
    if quantization is None:
        tensors = {from_hf_name(name): from_hf_layout(name, tensor) for name, tensor in tensors.items()}
    return Artifact(folder, config, quantization, tensors)


def _read_quantization(value: dict[str, Any], path: Path) -> Quantization | None:
    kind = value.get("model_type")
    if kind == "gpt2" and "positions" not in value:
        return None
    if kind != OWN_MODEL_TYPE:
        raise UserError(f"{path} has model_type {kind!r}, expected gpt2 or {OWN_MODEL_TYPE}")
    section = value.get("quantization")
    if section is None and value.get("positions") == "rotary":
        return None
    if not isinstance(section, dict) or section.get("format_version") != QUANTIZATION_FORMAT_VERSION:
        version = section.get("format_version") if isinstance(section, dict) else None
        raise UserError(
            f"{path}: quantization format version {version}, this program reads "
            f"{QUANTIZATION_FORMAT_VERSION}; quantize the fp32 artifact again"
        )
    if section.get("method") not in ("dynamic", "static") or section.get("weight_bits") != 8:
        raise UserError(
            f"{path}: quantization method {section.get('method')!r} with {section.get('weight_bits')} bits "
            "is unknown; expected dynamic or static with 8"
        )
    with damaged(path, "quantize the fp32 artifact again"):
        found = Quantization(str(section["method"]), tuple(map(str, section["smooth"])))
        if section != found.to_json():
            raise ValueError(f"its quantization section says {section}, expected {found.to_json()}")
        return found


def _read_tensors(path: Path) -> Tensors:
    if not path.exists():
        raise UserError(f"{path} is missing; convert or quantize again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}); it was truncated or altered"
        ) from None


def expected_tensors(
    config: ModelConfig, quantization: Quantization | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that model.safetensors must hold, by its name there."""
    C = config.n_embd
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in norm_names(config):
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (torch.float32, (C,))
    for name, (O, I) in layer_shapes(config).items():
        if name not in EMBEDDINGS:
            expected[f"{name}.bias"] = (torch.float32, (O,))
        if quantization is None:
            expected[f"{name}.weight"] = (torch.float32, (O, I) if name in EMBEDDINGS else (I, O))
            continue
        expected[f"{name}.weight"] = (torch.int8, (O, I))
        expected[f"{name}.weight_scale"] = (torch.float32, (O,))
        if name in quantization.smooth:
            expected[f"{name}.smooth"] = (torch.float32, (I,))
        if quantization.method == "static" and name != "wpe":
            head_or_layer = "lm_head" if name == "wte" else name
            expected[f"{head_or_layer}.input_scale"] = (torch.float32, ())
    if quantization is None:
        return {HF_PREFIX + name: entry for name, entry in expected.items()}
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
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds NaN or infinity; the file or its training is damaged")
        if name.endswith(("_scale", ".smooth")) and not bool((tensor > 0).all()):
            raise UserError(f"{where}: {name} holds a step that is not positive; the file is damaged")


def from_hf_name(name: str) -> str:
    """Return the module's name of a tensor of a Hugging Face GPT-2 file."""
    return name.removeprefix(HF_PREFIX)


def from_hf_layout(name: str, tensor: Tensor) -> Tensor:
    """Turn a Conv1D weight (I, O) into (O, I); others stay."""
    return tensor.t().contiguous() if name.endswith(CONV1D_SUFFIXES) else tensor


def int8_model(config: ModelConfig, tensors: Tensors) -> GPT:
    """Build the INT8 module from an artifact's tensors."""

    def get(name: str) -> Tensor | None:
        return tensors.get(name)

    layers: dict[str, nn.Module] = {}
    for name in layer_shapes(config):
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        smooth = get(f"{name}.smooth")
        if name in EMBEDDINGS:
            layers[name] = Int8Embedding(weight, scale, smooth)
        else:
            layers[name] = Int8Linear(weight, scale, get(f"{name}.bias"), get(f"{name}.input_scale"), smooth)
    # The head's own smoothing is folded into ln_f, so only the rows of the embedding are divided.
    head = (tensors["wte.weight"], tensors["wte.weight_scale"], None, get("lm_head.input_scale"))
    layers["lm_head"] = Int8Linear(*head)
    model = GPT(config, layers)
    norms = {f"{n}.{p}": tensors[f"{n}.{p}"] for n in norm_names(config) for p in ("weight", "bias")}
    model.load_state_dict(norms, strict=False)
    return model.eval().requires_grad_(False)


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
