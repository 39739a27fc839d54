"""The dataset folder: train.bin, val.bin and manifest.json, as `jaxgpt prepare` writes them.

    DATA/train.bin  DATA/val.bin   uint16 tokens: <|endoftext|> document <|endoftext|> ... <|endoftext|>
    DATA/manifest.json             source, tokenizer and its hash, counts, split rule, hash of each file
    DATA/train.mask.bin  val.mask.bin   with --answers-only, a bit a token, lowest first: the loss counts it
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
MASKED_FORMAT_VERSION = 2  # with a mask, which a reader of version 1 would pass over
TOKEN_DTYPE = np.dtype("<u2")
SPLITS = ("train", "val")

Tokens = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.uint8]  # a bit a token


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder whose files match their manifest.

    Attributes:
      folder: where it lies.
      manifest: the parsed manifest.json.
      train: tokens of the training split, memory-mapped.
      val: tokens of the validation split, memory-mapped.
      train_mask: which of its tokens the loss counts (see `counted`); None for all.
      val_mask: the same of the validation split.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    val: Tokens
    train_mask: Mask | None = None
    val_mask: Mask | None = None

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
        """UTF-8 bytes of the validation documents that the loss counts, separators not among them."""
        return int(self.manifest["counts"]["val_bytes" if self.val_mask is None else "val_answer_bytes"])

    @property
    def val_targets(self) -> int:
        """Tokens of the validation split that the loss counts: all but the first, or those of the answers."""
        if self.val_mask is None:
            return len(self.val) - 1
        return int(counted(self.val_mask, 1, len(self.val)).sum())

    @property
    def sha256(self) -> str:
        """Hash of manifest.json, and so of everything it names."""
        return sha256_of(self.folder / "manifest.json")

    def val_windows(self, block_size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return `windows` of the validation split; targets that the loss does not count are -1."""
        return windows(self.val, block_size, self.val_mask)


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
    if manifest.get("format_version") not in (DATASET_FORMAT_VERSION, MASKED_FORMAT_VERSION):
        raise UserError(
            f"dataset {folder} has format version {manifest.get('format_version')}, "
            f"expected {DATASET_FORMAT_VERSION} or {MASKED_FORMAT_VERSION}; prepare it again"
        )
    with damaged(folder / "manifest.json", "prepare it again"):
        splits = {
            name: _open_file(folder / f"{name}.bin", manifest["files"][f"{name}.bin"], TOKEN_DTYPE)
            for name in SPLITS
        }
        masks = [_open_mask(folder, name, manifest, len(splits[name])) for name in SPLITS]
        dataset = Dataset(folder, manifest, splits["train"], splits["val"], *masks)
        _ = dataset.tokenizer_sha256, str(manifest["tokenizer"]["name"])
        largest = max((int(tokens.max()) for tokens in splits.values() if len(tokens)), default=0)
        if largest >= dataset.vocab_size:
            raise ValueError(f"vocab_size {dataset.vocab_size}, but there is a token {largest}")
        if dataset.val_bytes < 1:
            raise ValueError(f"val_bytes {dataset.val_bytes}")
    return dataset


def _open_mask(folder: Path, split: str, manifest: dict[str, Any], tokens: int) -> Mask | None:
    if manifest["format_version"] != MASKED_FORMAT_VERSION:
        return None
    name = f"{split}.mask.bin"
    mask: Mask = _open_file(folder / name, manifest["files"][name], np.dtype(np.uint8))
    if len(mask) != -(-tokens // 8):
        raise ValueError(f"{name} has {len(mask)} bytes for {tokens} tokens")
    return mask


def _open_file(path: Path, entry: dict[str, Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
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
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def pack_mask(counts: npt.NDArray[np.bool_]) -> Mask:
    """Return which tokens the loss counts, (N,), as the bits that a data set holds: (ceil(N / 8),)."""
    return np.packbits(counts, bitorder="little")


def counted(mask: Mask, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Return whether the loss counts each of the tokens begin ... end - 1."""
    first = begin // 8
    bits = np.unpackbits(np.asarray(mask[first : -(-end // 8)]), bitorder="little")
    return bits[begin - 8 * first : end - 8 * first].astype(np.bool_)


def windows(
    tokens: Tokens, block_size: int, mask: Mask | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Cut a split into windows that predict each of its tokens but the first exactly once.

    Args:
      tokens: (N,), N > block_size.
      block_size: T, length of a window.
      mask: which tokens the loss counts; None for all.

    Returns:
      inputs: (W, T).
      targets: (W, T), the following tokens; -1, to be ignored, where the loss does not count them and after
        the end of the last window.

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
    if mask is not None:
        padded[: len(tokens)][~counted(mask, 0, len(tokens))] = -1
    targets = padded[1:].reshape(count, block_size)
    return inputs, targets


def check_tokens(largest: int, vocab_size: int, name: str) -> None:
    """Raise UserError for a token that a model does not have; frameworks fail otherwise each, or not at all.

    Args:
      largest: id among the tokens.
      vocab_size: of the model.
      name: of the model.
    """
    if largest >= vocab_size:
        raise UserError(
            f"the data holds token {largest}, {name} has tokens 0 to {vocab_size - 1}; give data that was "
            "prepared with the tokenizer of this model"
        )
