"""The artifact folder: a model that travels.

    config.json              shape, and for quantized artifacts the section `quantization`; see scheme.py
    model.safetensors        the tensors; see tensors.py
    tokenizer.json  vocab.json  merges.txt  tokenizer_config.json  generation_config.json
    certificate.json         where it came from and what was measured; see certificate.py
    probe.safetensors        tokens and the logits of the run they came from; see probe.py
    README.md                the model card; see model_card.py

A float32 artifact IS a Hugging Face GPT-2 folder: names `transformer.h.0.attn.c_attn.weight`, Conv1D layout
(I, O), a tied head not stored. One with rotary positions has the same names and layout, no wpe,
"positions": "rotary" and model_type "jaxgpt_gpt2", so that other loaders refuse it instead of reading it
wrongly. A quantized artifact has that model_type too, the plain names (`h.0.attn.c_attn.weight`) and rows
first (O, I). The float32 artifact of a quantization-aware training has

    qat.safetensors          NAME.input_scale, the trained scale of each linear layer's input, and `logits`,
                             those of the probe as the training computed them, rounded

Nothing is pickled. Nothing here needs PyTorch: `model.build` makes a module of an artifact.
"""

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxgpt.shared.architecture import linear_layers, matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.huggingface import hf_config_json, read_hf_config
from jaxgpt.shared.tensor_file import Arrays, write_tensor_file
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

from jaxgpt_export.format.certificate import TRAINED_FILE, altered_files, read_certificate
from jaxgpt_export.format.generation_config import read_generation_config, write_generation_config
from jaxgpt_export.format.scheme import FLOAT32, LayerScheme, Quantization, read_quantization
from jaxgpt_export.format.tensors import (
    FLOAT32_DTYPE,
    Shapes,
    check_tensors,
    expected_tensors,
    from_hf_layout,
    read_tensors,
)

INPUT_SCALE_SUFFIX = ".input_scale"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact folder that was read and checked.

    Attributes:
      folder: where it lies.
      config: shape.
      quantization: None for float32.
      tensors: by module name, matrices (O, I), whatever the file's layout.
      trained: what qat.safetensors holds; empty without one.
      generation: what generation_config.json says of how tokens are drawn; often nothing.
    """

    folder: Path
    config: ModelConfig
    quantization: Quantization | None
    tensors: Arrays
    trained: Arrays = dataclasses.field(default_factory=dict)
    generation: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Row name in reports without the engine: fp32, int8-dynamic, int4-weight-only, ..."""
        return "fp32" if self.quantization is None else self.quantization.method

    @property
    def schemes(self) -> Mapping[str, LayerScheme]:
        """What happens to each embedding and linear layer; float32 throughout where nothing is quantized."""
        if self.quantization is not None:
            return self.quantization.layers
        return dict.fromkeys((*matrices(self.config), *linear_layers(self.config)), FLOAT32)

    @property
    def input_scales(self) -> Arrays:
        """The scale that a quantization-aware training learned for each linear layer's input; else empty."""
        end = INPUT_SCALE_SUFFIX
        return {name.removesuffix(end): scale for name, scale in self.trained.items() if name.endswith(end)}

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


def read_artifact(folder: Path) -> Artifact:
    """Read an artifact folder and check every tensor.

    Raises:
      UserError: it is none, or a tensor is missing, extra, wrongly shaped or not finite; the message names
        what does not fit.
    """
    if not folder.is_dir():
        raise UserError(_no_folder(folder))
    if (folder / "model.onnx").exists() and not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} is a model for ONNX Runtime; give the artifact that it was made of")
    path = folder / "config.json"
    said = read_hf_config(path, "artifact configuration")
    config, section = said.model, said.quantization
    floats = said.is_plain or (config.positions == "rotary" and section is None)
    quantization = None if floats else read_quantization(section, config, path)
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    try:
        check_tensors(tensors, expected_tensors(config, quantization), file)
    except UserError as error:
        if said.is_plain and not os.path.lexists(folder / "certificate.json"):  # of other programs
            raise UserError(
                f"{folder} is a GPT-2 that another program saved; bring it in with: jaxgpt-export import-hf "
                f"--source {folder} --out ARTIFACT ({error})"
            ) from None
        raise
    if quantization is None:
        tensors = from_hf_layout(tensors, config)
    trained = _read_trained(folder / TRAINED_FILE, config)
    return Artifact(folder, config, quantization, tensors, trained, read_generation_config(folder))


def _no_folder(folder: Path) -> str:
    if os.path.lexists(folder):
        return f"{folder} is a file, expected an artifact folder"
    name = str(folder).removeprefix("hub:")
    is_name = name != str(folder) or len(folder.parts) == 1 or not folder.parent.exists()
    of_hub = f" or, of the hub, import-hf --source hub:{name}" if is_name and name.count("/") <= 1 else ""
    return f"artifact folder {folder} is missing; make one with: jaxgpt-export convert{of_hub}"


def read_certified_artifact(folder: Path) -> Artifact:
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


def _read_trained(path: Path, config: ModelConfig) -> Arrays:
    if not os.path.lexists(path):
        return {}
    tensors = read_tensors(path)
    expected: Shapes = {f"{name}{INPUT_SCALE_SUFFIX}": (FLOAT32_DTYPE, ()) for name in linear_layers(config)}
    rows = tensors["logits"].shape[:1] if "logits" in tensors else (0,)
    expected["logits"] = (FLOAT32_DTYPE, (*rows, config.vocab_size))
    check_tensors(tensors, expected, path)
    return tensors


def write_artifact(
    folder: Path,
    config: ModelConfig,
    quantization: Quantization | None,
    tensors: Arrays,
    tokenizer: Tokenizer,
    generation: Mapping[str, int | float] | None = None,
) -> None:
    """Write everything but certificate and probe into a folder (a temporary one; see files.new_folder).

    Args:
      folder: exists.
      config: shape.
      quantization: None for float32.
      tensors: by their names in the file (see `expected_tensors`), which they must match.
      tokenizer: of the model.
      generation: how its tokens are drawn where nobody says otherwise, if anything; see Artifact.
    """
    check_tensors(tensors, expected_tensors(config, quantization), folder / "model.safetensors")
    write_tensor_file(folder / "model.safetensors", tensors)
    section = None if quantization is None else quantization.to_json()
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.endoftext}
    value = hf_config_json(config, tokenizer.endoftext, section) | ids
    write_json(folder / "config.json", value)
    write_generation_config(folder, ids, generation or {})
    tokenizer.save(folder, config.block_size)
