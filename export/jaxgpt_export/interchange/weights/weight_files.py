"""Weight files of other programs, read without running what they may hold.

A pickle is read by inert_pickle.py and never otherwise. Whatever is wrong with a file is a UserError that
names it.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxgpt.shared.architecture import HEAD, HF_PREFIX
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json
from jaxgpt.shared.huggingface import OTHER_HEAD, is_unused
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import MIN_BYTE_LEVEL, OF_CHARACTERS, Tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jaxgpt_export.format.tensors import Shapes, check_tensors
from jaxgpt_export.interchange.weights.inert_pickle import load_inert
from jaxgpt_export.model.build import Tensors, as_array

HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What torch.load raises where names or shapes in a pickle are not what they should be.
MOST_PADDING = 1024  # rows of a vocabulary; others pad to a multiple of 64, 128 or so
MISREAD = (RuntimeError, TypeError, ValueError, AttributeError)
# What other modules put before GPT-2's names, in any order: torch.compile, DataParallel, Lightning.
PREFIXES = ("_orig_mod.", "module.", "model.", HF_PREFIX)


def read_weights(path: Path) -> Any:
    """Read a safetensors file, or a pickle of PyTorch.

    Returns:
      Tensors by name, or whatever the pickle holds: objects as inert stand-ins.

    Raises:
      UserError: the file is missing, damaged, or a pickle that holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"weights {path} are missing; check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no readable safetensors file ({error}); fetch it again") from None
    try:
        return load_inert(path)
    except (pickle.UnpicklingError, EOFError, LookupError, ArithmeticError, *MISREAD) as error:
        text = " ".join(str(error).split())
        found = re.search(r"GLOBAL [\w.]+|Unsupported \w+( \d+)?|PytorchStreamReader[^.:]*", text)
        reason = found[0].replace("GLOBAL", "it names") if found else text
        raise UserError(
            f"{path} can't be read as tensors and plain values ({reason[:80] or type(error).__name__}); "
            "it is damaged, or holds objects whose reading could run code: save its state dict as safetensors"
        ) from None


def read_folder(folder: Path) -> tuple[Tensors, list[Path]]:
    """Read the weights of a Hugging Face folder.

    Returns:
      The tensors under the file's names, and the files that hold them.
    """
    path = next((folder / name for name in HF_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights; expected one of: {', '.join(HF_WEIGHTS)}")
    if path.name.startswith("pytorch_model"):
        say(f"{path}: a pickle, read as tensors alone; a safetensors file is preferred where there is one")
    if path.suffix != ".json":
        return named_tensors(read_weights(path), path), [path]
    names: Any = read_json(path, "index of shards").get("weight_map")
    with damaged(path, "fetch it again"):
        shards = sorted({str(shard) for shard in names.values()})
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("its weight_map does not name files of this folder")
    tensors: Tensors = {}
    for shard in shards:
        tensors |= named_tensors(read_weights(folder / shard), folder / shard)
    if differing := sorted(tensors.keys() ^ names.keys()):
        raise UserError(f"{path} and its shards disagree on: {', '.join(differing)}; fetch them again")
    return tensors, [folder / shard for shard in shards]


def named_tensors(value: Any, path: Path) -> Tensors:
    """Return a state dict as it is; UserError when it is none."""
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{path} holds a {type(value).__name__}, expected a state dict (names and tensors)")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
        if not _is_plain(tensor):
            raise UserError(
                f"{path}: {name} is {tensor.dtype} of layout {tensor.layout} on {tensor.device}, expected "
                "plain numbers in memory; save the state dict of the float model"
            )
    return dict(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory, one after the other, as what they are."""
    layouts = tensor.layout == torch.strided and not tensor.is_nested
    return layouts and tensor.device.type == "cpu" and not (tensor.is_quantized or tensor.is_complex())


def plain_names(tensors: Tensors, path: Path) -> Tensors:
    """Remove PREFIXES from names, and leave out stored causal masks and, saying so, other heads.

    Raises:
      UserError: two tensors get the same name.
    """
    plain: Tensors = {}
    for name, tensor in tensors.items():
        short = name
        while prefix := next(filter(short.startswith, PREFIXES), ""):
            short = short.removeprefix(prefix)
        if short in plain:
            raise UserError(f"{path} holds {short} twice, under names with and without a prefix")
        plain[short] = tensor
    if others := sorted(filter(OTHER_HEAD.fullmatch, plain)):
        say(f"{path}: {', '.join(others)[:200]} are of another head than the language model's and left out")
    return {name: tensor for name, tensor in plain.items() if not is_unused(name)}


def as_float32(tensors: Tensors, path: Path) -> Arrays:
    """Turn floats of any precision into float32 arrays, and say so; integers stay, to be refused."""
    kinds = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    if others := sorted(kinds - {"float32"}):
        say(f"{path}: {', '.join(others)} weights become float32")
    return {name: as_array(t.float() if t.is_floating_point() else t) for name, t in tensors.items()}


def check_layout(tensors: Arrays, expected: Shapes, path: Path, layout: str) -> None:
    """Compare tensors with what a configuration asks for.

    Args:
      tensors: by module name, in the file's layout.
      expected: dtype and shape of each.
      path: for messages.
      layout: of the file's matrices, for messages: "(I, O), as Conv1D does".

    Raises:
      UserError: one is missing, extra, transposed, of another shape, or holds NaN or infinity.
    """
    for name, (_, shape) in expected.items():
        found = tensors[name].shape if name in tensors else shape
        if found != shape and found == shape[::-1]:
            raise UserError(
                f"{path}: {name} is {found}, expected {shape}: it is transposed; this format stores "
                f"matrices {layout}"
            )
    check_tensors(tensors, expected, path)


def trim_vocabulary(tensors: Arrays, tokenizer: Tokenizer, path: Path) -> Arrays:
    """Leave out the rows of embedding and head that are no token, and say so.

    Raises:
      UserError: the tokenizer has more tokens than there are rows, or so few that the rest is no padding.
    """
    rows, wanted = len(tensors["wte.weight"]), tokenizer.vocab_size
    if rows < min(wanted, MIN_BYTE_LEVEL):
        raise UserError(f"{path}: the model has {rows} tokens, {OF_CHARACTERS}")
    if rows < wanted or rows - wanted > MOST_PADDING:
        raise UserError(
            f"{path}: the model has {rows} tokens, the tokenizer {wanted}; give the tokenizer of this model"
        )
    if rows == wanted:
        return tensors
    say(f"{path}: rows {wanted} to {rows - 1} of the vocabulary are no token and are left out")
    padded = ("wte.weight", f"{HEAD}.weight")
    return {name: array[:wanted].copy() if name in padded else array for name, array in tensors.items()}


def tie_equal_head(tensors: Arrays) -> tuple[Arrays, bool]:
    """Leave out a head that equals the embedding; the values decide, whatever a configuration says.

    Returns:
      The tensors, and whether the head is tied.
    """
    head = tensors.get(f"{HEAD}.weight")
    tied = head is None or np.array_equal(head, tensors["wte.weight"])
    return {name: array for name, array in tensors.items() if not (tied and name == f"{HEAD}.weight")}, tied
