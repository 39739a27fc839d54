"""Opens a dataset folder: what its manifest says is held against the files, and nothing is read twice."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.dataset.checked_files import checked_files
from jaxgpt.shared.dataset.shards import TOKEN_DTYPE, Mask, ShardedMask, ShardedTokens, Tokens, map_file
from jaxgpt.shared.dataset.windows import counted, windows
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import as_path, read_json, sha256_of

DATASET_FORMAT_VERSION = 1
MASKED_FORMAT_VERSION = 2  # with a mask, which a reader of version 1 would pass over
SHARDED_FORMAT_VERSION = 3  # the training split lies in several files; masks beside them or not
VERSIONS = (DATASET_FORMAT_VERSION, MASKED_FORMAT_VERSION, SHARDED_FORMAT_VERSION)


def shard_name(number: int) -> str:
    """Return the name of a file of training tokens, counted from 0."""
    return f"train-{number:05d}.bin"


def mask_name(tokens: str) -> str:
    """Return the name of the mask beside a file of tokens."""
    return f"{tokens.removesuffix('.bin')}.mask.bin"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder whose files match their manifest.

    Attributes:
      folder: where it lies.
      manifest: the parsed manifest.json.
      train: tokens of the training split, memory-mapped; see ShardedTokens where they lie in several files.
      val: tokens of the validation split, memory-mapped.
      train_mask: which of its tokens the loss counts (see `counted`); None for all.
      val_mask: the same of the validation split.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens | ShardedTokens
    val: Tokens
    train_mask: Mask | ShardedMask | None = None
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

    def val_windows(
        self, block_size: int, first: int = 0, end: int | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return `windows` of the validation split; targets that the loss does not count are -1."""
        return windows(self.val, block_size, self.val_mask, first, end)


def open_dataset(folder: Path | str) -> Dataset:
    """Open a dataset folder and check every file against its manifest.

    Sizes are checked each time; hashes once, and again when a file changed.

    Args:
      folder: what `jaxgpt prepare --out` wrote.

    Raises:
      UserError: a file is missing, truncated or altered, or the manifest is of another version.
    """
    folder = as_path(folder, "dataset folder")
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a dataset folder; make one with: jaxgpt prepare")
    if not folder.is_dir():
        raise UserError(f"dataset folder {folder} is missing; make one with: jaxgpt prepare --out {folder}")
    manifest = read_json(folder / "manifest.json", "dataset manifest")
    if manifest.get("format_version") not in VERSIONS:
        raise UserError(
            f"dataset {folder} has format version {manifest.get('format_version')}, "
            f"expected {', '.join(map(str, VERSIONS[:-1]))} or {VERSIONS[-1]}; prepare it again"
        )
    with damaged(folder / "manifest.json", "prepare it again"):
        files = {str(name): _checked_size(folder / name, entry) for name, entry in manifest["files"].items()}
        dataset = Dataset(folder, manifest, *_splits(folder, manifest, files))
        _ = dataset.tokenizer_sha256, str(manifest["tokenizer"]["name"])
        largest = _check_hashes(folder, manifest, files)
        if largest >= dataset.vocab_size:
            raise ValueError(f"vocab_size {dataset.vocab_size}, but there is a token {largest}")
        if dataset.val_bytes < 1:
            raise ValueError(f"val_bytes {dataset.val_bytes}")
    return dataset


def _splits(
    folder: Path, manifest: dict[str, Any], files: dict[str, int]
) -> tuple[Tokens | ShardedTokens, Tokens, Mask | ShardedMask | None, Mask | None]:
    """Map the tokens of training and of validation, and their masks."""
    sharded = manifest["format_version"] == SHARDED_FORMAT_VERSION
    names = [shard_name(i) for i in range(int(manifest["shards"]))] if sharded else ["train.bin"]
    has_masks = manifest["format_version"] == MASKED_FORMAT_VERSION or mask_name("val.bin") in files
    for name in (*names, "val.bin"):
        masks = {mask_name(name): -(-files[name] // 2 // 8)} if has_masks else {}
        for mask, expected in masks.items():
            if files[mask] != expected:
                raise ValueError(f"{mask} has {files[mask]} bytes for {files[name] // 2} tokens")
    mapped = functools.partial(map_file, dtype=np.dtype(np.uint8))
    val = map_file(folder / "val.bin", TOKEN_DTYPE)
    val_mask = mapped(folder / mask_name("val.bin")) if has_masks else None
    if not sharded:
        train_mask = mapped(folder / mask_name("train.bin")) if has_masks else None
        return map_file(folder / "train.bin", TOKEN_DTYPE), val, train_mask, val_mask
    lengths = [files[name] // 2 for name in names]
    tokens = ShardedTokens([folder / name for name in names], lengths)
    shards = ShardedMask([folder / mask_name(name) for name in names], lengths) if has_masks else None
    return tokens, val, shards, val_mask


def _checked_size(path: Path, entry: dict[str, Any]) -> int:
    expected_bytes = int(entry["bytes"])
    if not path.exists():
        raise UserError(f"{path} is missing; prepare the dataset again")
    actual_bytes = path.stat().st_size
    if actual_bytes != expected_bytes:
        raise UserError(
            f"{path} holds {actual_bytes} bytes, its manifest says {expected_bytes}; "
            "it was truncated or altered, prepare the dataset again"
        )
    return actual_bytes


def _check_hashes(folder: Path, manifest: dict[str, Any], files: dict[str, int]) -> int:
    """Hold the files against their hashes; return the largest token."""
    largest = 0
    for name, found in checked_files(folder, files).items():
        expected = str(manifest["files"][name]["sha256"])
        if found.sha256 != expected:
            raise UserError(
                f"{folder / name} has sha256 {found.sha256[:12]}..., its manifest says {expected[:12]}...; "
                "it was altered, prepare the dataset again"
            )
        if not name.endswith(".mask.bin"):
            largest = max(largest, found.largest)
    return largest
