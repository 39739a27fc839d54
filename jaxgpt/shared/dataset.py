"""The dataset folder: train.bin, val.bin and manifest.json, as `jaxgpt prepare` writes them.

    DATA/train.bin  DATA/val.bin   uint16 tokens: <|endoftext|> document <|endoftext|> ... <|endoftext|>
    DATA/manifest.json             source, tokenizer and its hash, counts, split rule, hash of each file
    DATA/vocab.json  merges.txt  tokenizer.json   the tokenizer, in GPT-2's files

Standard library and numpy only; reading is a memory map.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import as_path, read_json, sha256_of

DATASET_FORMAT_VERSION = 1
TOKEN_DTYPE = np.dtype("<u2")
SPLITS = ("train", "val")

Tokens = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder whose files match their manifest.

    Attributes:
      folder: where it lies.
      manifest: the parsed manifest.json.
      train: tokens of the training split, memory-mapped.
      val: tokens of the validation split, memory-mapped.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    val: Tokens

    @property
    def vocab_size(self) -> int:
        """V, of the tokenizer that made the tokens."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def tokenizer_sha256(self) -> str:
        """The tokenizer's identity."""
        return str(self.manifest["tokenizer"]["sha256"])

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the validation documents, separators not counted."""
        return int(self.manifest["counts"]["val_bytes"])

    @property
    def sha256(self) -> str:
        """Hash of manifest.json, and so of everything it names."""
        return sha256_of(self.folder / "manifest.json")


def open_dataset(folder: Path | str) -> Dataset:
    """Open a dataset folder and check every file against its manifest.

    Args:
      folder: what `jaxgpt prepare --out` wrote.

    Raises:
      UserError: a file is missing, truncated or altered, or the manifest is of another version.
    """
    folder = as_path(folder, "dataset folder")
    if not folder.is_dir():
        raise UserError(f"dataset folder {folder} is missing; make one with: jaxgpt prepare --out {folder}")
    manifest = read_json(folder / "manifest.json", "dataset manifest")
    if manifest.get("format_version") != DATASET_FORMAT_VERSION:
        raise UserError(
            f"dataset {folder} has format version {manifest.get('format_version')}, "
            f"expected {DATASET_FORMAT_VERSION}; prepare it again"
        )
    with damaged(folder / "manifest.json", "prepare it again"):
        splits = {name: _open_tokens(folder, name, manifest["files"][f"{name}.bin"]) for name in SPLITS}
        dataset = Dataset(folder, manifest, **splits)
        _ = dataset.tokenizer_sha256, str(manifest["tokenizer"]["name"])
        largest = max((int(tokens.max()) for tokens in splits.values() if len(tokens)), default=0)
        if largest >= dataset.vocab_size:
            raise ValueError(f"vocab_size {dataset.vocab_size}, but there is a token {largest}")
        if dataset.val_bytes < 1:
            raise ValueError(f"val_bytes {dataset.val_bytes}")
    return dataset


def _open_tokens(folder: Path, split: str, entry: dict[str, Any]) -> Tokens:
    path = folder / f"{split}.bin"
    expected_bytes = int(entry["bytes"])
    if not path.exists():
        raise UserError(f"{path} is missing; prepare the dataset again")
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        raise UserError(
            f"{path} holds {actual_bytes} bytes, its manifest says {expected_bytes}; "
            "it was truncated or altered, prepare the dataset again"
        )
    actual_hash = sha256_of(path)
    if actual_hash != entry["sha256"]:
        raise UserError(
            f"{path} has sha256 {actual_hash[:12]}..., its manifest says {str(entry['sha256'])[:12]}...; "
            "it was altered, prepare the dataset again"
        )
    if not actual_bytes:
        return np.zeros(0, TOKEN_DTYPE)
    return np.memmap(path, TOKEN_DTYPE, mode="r")


def windows(tokens: Tokens, block_size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Cut a split into windows that predict each of its tokens but the first exactly once.

    Args:
      tokens: (N,), N > block_size.
      block_size: T, length of a window.

    Returns:
      inputs: (W, T).
      targets: (W, T), the following tokens; -1, to be ignored, after the end of the last window.

    Raises:
      UserError: the split has no full window.
    """
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the validation split has {len(tokens)} tokens, one window needs block_size + 1 = "
            f"{block_size + 1}; prepare more text, raise --val-fraction or lower --block-size"
        )
    count = -(-(len(tokens) - 1) // block_size)
    padded = np.full(count * block_size + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    inputs = np.maximum(padded[:-1], 0).reshape(count, block_size)
    targets = padded[1:].reshape(count, block_size)
    return inputs, targets
