"""Makes the dataset folder of what the stages left in the work folder."""

import contextlib
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.overlap import OVERLAP_TOKENS
from jaxgpt.data.stages.read import part_summaries, parts_of
from jaxgpt.data.stages.shards import LENGTHS, StreamWriter
from jaxgpt.data.stages.vocabulary import tokenizer_in
from jaxgpt.data.work.work_folder import Work
from jaxgpt.shared.dataset import (
    DATASET_FORMAT_VERSION,
    MASKED_FORMAT_VERSION,
    SHARDED_FORMAT_VERSION,
    TOKEN_DTYPE,
    mask_name,
    shard_name,
)
from jaxgpt.shared.dataset.shards import bits, map_file
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import new_folder, write_json

# Up to so many bytes of documents there is one file of training tokens, else a shard a part.
ONE_FILE_BYTES = 128_000_000
_TOKENS_AT_ONCE = 1 << 20

Entry = dict[str, Any]  # of a file in the manifest


def write_dataset(
    work: Work, out: Path, overwrite: bool, counts: Counter[str], entries: dict[str, Any]
) -> dict[str, Any]:
    """Write the dataset folder; return its manifest.

    Args:
      work: all stages are done.
      out: the folder to make.
      overwrite: replace an earlier one.
      counts: gains what the splits hold.
      entries: of the manifest: what is said of source, tokenizer and split.

    Raises:
      UserError: no validation document is left.
    """
    shards = part_summaries(work, "training")
    _count(work, counts, shards)
    masked = bool(work.plan["answers_only"])
    sharded = counts["train_bytes"] + counts["val_bytes"] > ONE_FILE_BYTES
    version = MASKED_FORMAT_VERSION if masked else DATASET_FORMAT_VERSION
    manifest = {
        "format_version": SHARDED_FORMAT_VERSION if sharded else version,
        **entries,
        "counts": dict(sorted(counts.items())),
        **({"shards": len(shards)} if sharded else {}),
        "files": {},
    }
    with new_folder(out, overwrite, "manifest.json") as folder:
        tokenizer_in(work).save(folder)
        files = _link_shards(work, folder, masked) if sharded else _one_file(work, folder, masked)
        manifest["files"] = files | _validation(work, folder, masked)
        write_json(folder / "manifest.json", manifest)
    return manifest


def _count(work: Work, counts: Counter[str], shards: list[dict[str, Any]]) -> None:
    """Count what the splits hold."""
    counts["val_overlapping"] = sum(summary["overlapping"] for summary in part_summaries(work, "overlap"))
    validation = sum(summary["documents"] for summary in part_summaries(work, "validation"))
    if counts["val_overlapping"] == validation:
        raise UserError(
            f"every validation document shares {OVERLAP_TOKENS} tokens with training (what stands in all of "
            "them, such as a licence or the words of a template, counts too); give more text"
        )
    names = ["documents", "bytes", "tokens", *(["answer_bytes"] if work.plan["answers_only"] else [])]
    for name in names:
        counts[f"train_{name}"] = sum(shard[name] for shard in shards)
    kept = [lengths[_kept(work, part)] for part, lengths in _lengths(work)]
    counts["val_documents"] = sum(map(len, kept))
    counts["val_tokens"] = 1 + sum(int((each["tokens"] + 1).sum()) for each in kept)
    for name in ("bytes", "answer_bytes"):
        if name in names:
            counts[f"val_{name}"] = sum(int(each[name].sum()) for each in kept)


def _lengths(work: Work) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    for part in range(len(parts_of(work))):
        yield part, map_file(work.path("validation", part, ".lengths"), LENGTHS)


def _kept(work: Work, part: int) -> npt.NDArray[np.bool_]:
    """Return which validation documents of a part share nothing with training."""
    return ~np.load(work.path("overlap", part, ".npy"))


def _link_shards(work: Work, folder: Path, masked: bool) -> dict[str, Entry]:
    """Take over the shards; the work folder keeps them until the data set is there."""
    files: dict[str, Entry] = {}
    for part, shard in enumerate(part_summaries(work, "training")):
        name = shard_name(part)
        sources = [(name, ".tokens", "sha256")]
        sources += [(mask_name(name), ".mask", "mask_sha256")] if masked else []
        for target, suffix, key in sources:
            path = folder / target
            _link(work.path("training", part, suffix), path)
            files[target] = {"bytes": path.stat().st_size, "sha256": shard[key]}
    return files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _one_file(work: Work, folder: Path, masked: bool) -> dict[str, Entry]:
    """Join the shards."""
    with _Streams(folder, "train.bin", masked) as streams:
        for part in range(len(parts_of(work))):
            tokens = map_file(work.path("training", part, ".tokens"), TOKEN_DTYPE)
            mask = map_file(work.path("training", part, ".mask"), np.dtype(np.uint8)) if masked else None
            for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
                end = min(begin + _TOKENS_AT_ONCE, len(tokens))
                counted = None if mask is None else bits(mask, begin, end)
                streams.add(tokens[begin:end], counted)
    return streams.entries


def _validation(work: Work, folder: Path, masked: bool) -> dict[str, Entry]:
    """Join the validation documents that are kept."""
    endoftext = np.array([tokenizer_in(work).endoftext], TOKEN_DTYPE)
    with _Streams(folder, "val.bin", masked) as streams:
        streams.add(endoftext, np.zeros(1, np.bool_))
        for part, lengths in _lengths(work):
            tokens = map_file(work.path("validation", part, ".tokens"), TOKEN_DTYPE)
            counted = map_file(work.path("validation", part, ".counted"), np.dtype(np.bool_))
            begin = 0
            for size, kept in zip((lengths["tokens"] + 1).tolist(), _kept(work, part).tolist(), strict=True):
                if kept:
                    one = slice(begin, begin + size)
                    streams.add(tokens[one], counted[one] if masked else None)
                begin += size
    return streams.entries


@dataclasses.dataclass
class _Streams:
    """A split's file of tokens, and with a mask that too.

    Attributes:
      folder: where they are written.
      name: of the file of tokens.
      masked: whether there is a mask.
      entries: of the manifest, when all is written.
    """

    folder: Path
    name: str
    masked: bool
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> "_Streams":
        names = [self.name, *([mask_name(self.name)] if self.masked else [])]
        self._stack = contextlib.ExitStack()
        self._writers = {
            name: self._stack.enter_context(StreamWriter(self.folder / name, bits=name != self.name))
            for name in names
        }
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        for name, writer in self._writers.items():
            self.entries[name] = {
                "bytes": (self.folder / name).stat().st_size,
                "sha256": writer.sha256,
            }

    def add(self, tokens: npt.NDArray[Any], counted: npt.NDArray[np.bool_] | None) -> None:
        """Write tokens, and whether the loss counts each."""
        self._writers[self.name].add(tokens)
        if self.masked and counted is not None:
            self._writers[mask_name(self.name)].add(counted)
