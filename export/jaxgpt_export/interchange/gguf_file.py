"""`jaxgpt-export gguf`: a float32 artifact -> one GGUF file, which llama.cpp runs as it is.

    jaxgpt-export gguf --artifact ART --out FILE.gguf --type f32|f16|q8_0

    f32, f16   the matrices in that type
    q8_0       the matrices in blocks of 32 weights of a row: int8, with a float16 scale = largest / 127

Norms, biases and positions stay float32 always. llama.cpp reads GELU from a table in float16, so that its
logits differ from this program's by about 1e-3 of their size, also with f32.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import LAYER_NORM_EPSILON, parameters
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_new_file, new_file
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.format.artifact import Artifact, read_certified_artifact

FileType = Literal["f32", "f16", "q8_0"]
Q8_0_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class GgufOptions:
    """Write a float32 artifact as a GGUF file for llama.cpp.

    Attributes:
      artifact: the float32 artifact, with learned positions.
      out: the file to write, NAME.gguf.
      type: of the matrices: f32, f16 or q8_0.
      overwrite: replace an earlier file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    out: Path
    type: FileType = "f16"
    overwrite: bool = False
    json: bool = False


def gguf_command(options: GgufOptions) -> Result:
    """Run `jaxgpt-export gguf`."""
    check_new_file(options.out, options.overwrite, ".gguf")
    artifact = read_certified_artifact(options.artifact)
    _check(artifact, options.type)
    tokenizer = artifact.tokenizer()
    with new_file(options.out) as path:
        write_gguf(artifact, tokenizer, path, options.type)
    size = options.out.stat().st_size
    say(f"{options.out}: {options.type}, {size / 1e6:.2f} MB; run it with: llama-cli -m {options.out}")
    return Result({"type": options.type, "size_mb": size / 1e6})


def _check(artifact: Artifact, kind: FileType) -> None:
    """Raise UserError for what llama.cpp's gpt2 does not compute or can't store."""
    config = artifact.config
    if artifact.quantization is not None:
        raise UserError(
            f"{artifact.folder} is {artifact.kind}; gguf takes the float32 artifact (--type q8_0)"
        )
    if config.positions != "learned":
        raise UserError(
            f"{artifact.folder} has {config.positions} positions; llama.cpp's gpt2 has learned ones"
        )
    if kind == "q8_0" and config.n_embd % Q8_0_BLOCK:
        raise UserError(
            f"n_embd ({config.n_embd}) must be divisible by {Q8_0_BLOCK} for q8_0; take --type f16"
        )


def check_gguf_tokenizer(tokenizer: Tokenizer, where: Path) -> None:
    """Raise UserError for a tokenizer that llama.cpp would run otherwise.

    Args:
      tokenizer: to write.
      where: of the artifact, for messages.
    """
    layout = tokenizer.layout
    reasons = {
        "splits text otherwise than GPT-2": not layout.works_as_gpt2,
        "lacks some of the 256 bytes": not layout.has_every_byte,
        "has no merges, and llama.cpp loads no such file": tokenizer.merges_text().count("\n") < 2,
        "has added tokens that take white space with them": any(t.lstrip or t.rstrip for t in layout.added),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"the tokenizer of {where} {', '.join(found)}; gguf can't write it")


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            "this command needs gguf, which is not installed; pip install -c constraints.txt -e '.[gguf]'"
        ) from None
    return gguf


def write_gguf(artifact: Artifact, tokenizer: Tokenizer, path: Path, kind: FileType) -> None:
    """Write the file, and read it back.

    Args:
      artifact: float32, with learned positions.
      tokenizer: of the artifact.
      path: whose folder exists.
      kind: type of the matrices.

    Raises:
      UserError: llama.cpp would run the tokenizer otherwise, a weight is too large for float16, or what the
        library wrote is not what it was given.
    """
    gguf = _gguf()
    check_gguf_tokenizer(tokenizer, artifact.folder)
    config = artifact.config
    types = gguf.LlamaFileType
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(artifact.folder.resolve().name)
    writer.add_file_type({"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[kind])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    _add_tokenizer(writer, tokenizer, gguf.TokenType)
    for parameter in parameters(config):
        name, theirs = parameter.name, parameter.gguf_name
        array: npt.NDArray[Any] = np.ascontiguousarray(artifact.tensors[name])
        if kind == "f32" or array.ndim == 1 or name == "wpe.weight":
            writer.add_tensor(theirs, array)
        elif kind == "f16":
            writer.add_tensor(theirs, _as_float16(array, name))
        else:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_written(path, artifact, tokenizer)


def _check_written(path: Path, artifact: Artifact, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the library's own reader finds every tensor, token and merge in a file."""
    reader = _gguf().GGUFReader(path)
    merges = tokenizer.merges_text().splitlines()[1:]
    sizes = {"tokens": tokenizer.vocab_size, "token_type": tokenizer.vocab_size, "merges": len(merges)}
    fields = {name: reader.fields.get(f"tokenizer.ggml.{name}") for name in sizes}
    wrong = [name for name, size in sizes.items() if fields[name] is None or len(fields[name].data) != size]
    shapes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    expected = {each.gguf_name: artifact.tensors[each.name].shape for each in parameters(artifact.config)}
    wrong += sorted(
        name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
    )
    if wrong:
        raise UserError(f"the GGUF file that was written lacks or changes {', '.join(wrong)}; it is not kept")


def _as_float16(array: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    largest = float(np.abs(array).max())
    if largest > np.finfo(np.float16).max:
        raise UserError(f"{name} holds {largest:.3g}, more than float16 can; take --type f32")
    return array.astype(np.float16)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, token_type: Any) -> None:
    """Add tokens and merges as llama.cpp's byte-level BPE reads them."""
    tokens = [f"[UNUSED{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [token_type.UNUSED] * len(tokens)
    for token, i in tokenizer.vocab().items():
        tokens[i], kinds[i] = token, token_type.NORMAL
    for added in tokenizer.layout.added:
        kinds[added.id] = token_type.CONTROL if added.special else token_type.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(tokenizer.merges_text().splitlines()[1:])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.endoftext)
    writer.add_add_bos_token(False)
