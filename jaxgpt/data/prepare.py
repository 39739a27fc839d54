"""`jaxgpt prepare`: source text -> dataset folder.

    jaxgpt prepare --source stdlib --tokenizer bpe:1024 --out data/stdlib

Deduplicate, split by document (for code by file), train the tokenizer on the training documents, encode,
drop validation documents that share 50 consecutive tokens with training, write. The folder appears whole
or not at all.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.data.sources import Document, open_source
from jaxgpt.data.tokenizers import check_tokenizer_name, is_bpe, make_tokenizer
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of, write_json
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.tokens import DATASET_FORMAT_VERSION, TOKEN_DTYPE, Tokens

OVERLAP_TOKENS = 50
ENCODE_CHUNK = 2000  # documents encoded between two movements of the progress bar


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Turn source text into a dataset folder of tokens.

    Attributes:
      source: hub:NAME[@REVISION], stdlib, packages:NAME,..., or a .jsonl, .json, .parquet, .txt or .py
        file or a folder of such files (.py files give docstring -> code pairs).
      out: the dataset folder to write.
      tokenizer: gpt2, bpe:N (N tokens, trained on the training documents), or a folder with merges.txt and
        vocab.json (of an artifact, a data set), whose tokenizer is taken.
      val_fraction: share of the groups (files for code, else documents) that go into validation.
      text_column: column of a table that holds the text.
      threads: threads that encode; 0 takes all that this process may use.
      overwrite: replace an earlier dataset folder.
      json: print one JSON document with all figures on stdout.
    """

    out: Path
    source: str = "hub"
    tokenizer: str = "gpt2"
    val_fraction: float = 0.05
    text_column: str = "text"
    threads: int = 0
    overwrite: bool = False
    json: bool = False


def prepare(options: PrepareOptions) -> Result:
    """Run `jaxgpt prepare`.

    Raises:
      UserError: the source can't be read, is empty, or leaves a split empty.
    """
    check_tokenizer_name(options.tokenizer)
    inputs = [Path(options.source or ".")]
    if options.tokenizer != "gpt2" and not is_bpe(options.tokenizer):
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "manifest.json", inputs)
    if options.threads < 0:
        raise UserError(f"threads ({options.threads}) must be 0 (all that there are) or more")
    if not 0.0 < options.val_fraction < 1.0:
        raise UserError(f"val_fraction ({options.val_fraction}) must lie between 0 and 1")
    source = open_source(options.source, options.text_column)
    counts: Counter[str] = Counter()
    documents = deduplicate(source.documents, counts)
    if not documents:
        raise UserError(
            f"source {options.source!r} is empty: no document with text in it; check the path (of .py files "
            "only functions and classes with a docstring of 3 words or more and 3 lines of code are taken)"
        )
    train, val = split(documents, options.val_fraction)
    if not train or not val:
        raise UserError(
            f"source {options.source!r} has {len(documents)} documents, and the split left "
            f"{len(train)} for training, {len(val)} for validation; give more text or another --val-fraction"
        )
    say(f"{options.source}: {len(documents)} documents, {counts['duplicates']} duplicates left out")
    tokenizer = make_tokenizer(options.tokenizer, train)
    if is_bpe(options.tokenizer) and tokenizer.vocab_size < int(options.tokenizer.partition(":")[2]):
        say(f"{options.tokenizer}: the text has pairs for {tokenizer.vocab_size} tokens only")
    threads = options.threads or len(os.sched_getaffinity(0))
    train_tokens = encode(train, tokenizer, threads, "encoding train")
    val_tokens = encode(val, tokenizer, threads, "encoding val")
    kept = without_overlap(train_tokens, val_tokens, tokenizer.endoftext)
    counts["val_overlapping"] = len(val) - len(kept)
    val = [val[i] for i in kept]
    if not val:
        raise UserError(
            f"every validation document shares {OVERLAP_TOKENS} tokens with training; give more text"
        )
    arrays = {
        "train": join(train_tokens, tokenizer.endoftext),
        "val": join([val_tokens[i] for i in kept], tokenizer.endoftext),
    }
    texts = {"train": train, "val": val}
    for name in arrays:
        counts[f"{name}_documents"] = len(texts[name])
        counts[f"{name}_bytes"] = sum(len(text.encode()) for text in texts[name])
        counts[f"{name}_tokens"] = len(arrays[name])
    with new_folder(options.out, options.overwrite, "manifest.json") as folder:
        tokenizer.save(folder)
        manifest = _manifest(options, source.revision, tokenizer, counts)
        for name, array in arrays.items():
            path = folder / f"{name}.bin"
            array.tofile(path)
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(folder / "manifest.json", manifest)
    say(
        f"{options.out}: {counts['train_tokens']:,} training tokens "
        f"({counts['train_documents']:,} documents), "
        f"{counts['val_tokens']:,} validation tokens ({counts['val_documents']:,} documents; "
        f"{counts['val_overlapping']} dropped for sharing {OVERLAP_TOKENS} tokens with training), "
        f"vocabulary {tokenizer.vocab_size}"
    )
    return Result(manifest)


def deduplicate(documents: Any, counts: Counter[str]) -> list[Document]:
    """Keep the first of equal documents, drop blank ones, and replace what UTF-8 can't hold.

    Args:
      documents: iterable of Document.
      counts: gains "documents_read", "blank" and "duplicates".
    """
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        counts["documents_read"] += 1
        text = document.text.strip().encode("utf-8", "replace")
        if not text:
            counts["blank"] += 1
            continue
        digest = hashlib.sha256(text).digest()
        if digest in seen:
            counts["duplicates"] += 1
            continue
        seen.add(digest)
        kept.append(Document(text.decode(), document.group))
    return kept


def split(documents: Sequence[Document], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split by group: a group is in validation when its hash, read as a number in [0, 1), is below the share.

    So a document's split depends on nothing but its own group: more data never moves it.
    """
    train: list[str] = []
    val: list[str] = []
    for document in documents:
        digest = hashlib.sha256(document.group.encode("utf-8", "replace")).digest()
        in_val = int.from_bytes(digest[:8], "big") / 2**64 < val_fraction
        (val if in_val else train).append(document.text)
    return train, val


def encode(texts: Sequence[str], tokenizer: Tokenizer, threads: int, title: str) -> list[Tokens]:
    """Encode documents in parallel, with a progress bar on stderr."""
    encoded: list[Tokens] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(title, total=len(texts))
        for start in range(0, len(texts), ENCODE_CHUNK):
            batch = texts[start : start + ENCODE_CHUNK]
            encoded += [np.array(tokens, TOKEN_DTYPE) for tokens in tokenizer.encode_batch(batch, threads)]
            progress.advance(task, len(batch))
    return encoded


def join(documents: Sequence[Tokens], endoftext: int) -> Tokens:
    """Join documents: <|endoftext|> before the first, between two, and after the last."""
    separator = np.array([endoftext], TOKEN_DTYPE)
    parts = [separator]
    for document in documents:
        parts += [document, separator]
    return np.concatenate(parts)


def without_overlap(train: Sequence[Tokens], val: Sequence[Tokens], endoftext: int) -> list[int]:
    """Find the validation documents that share no run of 50 tokens with any training document.

    Runs are compared by a 64-bit hash; a collision (about 1e-7 for 2 M against 2 M runs) drops a document
    too many, never too few.

    Args:
      train: training documents.
      val: validation documents.
      endoftext: separates documents, so that no run crosses two.

    Returns:
      Indices into `val`.
    """
    seen = np.unique(run_hashes(join(train, endoftext)))
    kept = []
    for index, document in enumerate(val):
        hashes = run_hashes(document)
        at = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1) if len(seen) else hashes[:0]
        if not len(at) or not (seen[at] == hashes).any():
            kept.append(index)
    return kept


def run_hashes(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """Hash every run of 50 consecutive tokens.

    Args:
      tokens: (N,).

    Returns:
      (max(N - 49, 0),) polynomial hashes modulo 2^64 over random 64-bit values of the tokens.
    """
    count = len(tokens) - OVERLAP_TOKENS + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    values = np.random.default_rng(0).integers(0, 2**64, 2**16, np.uint64)[tokens]
    hashes = np.zeros(count, np.uint64)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for offset in range(OVERLAP_TOKENS):
        hashes *= multiplier
        hashes += values[offset : offset + count]
    return hashes


def _manifest(
    options: PrepareOptions, revision: str, tokenizer: Tokenizer, counts: Counter[str]
) -> dict[str, Any]:
    return {
        "format_version": DATASET_FORMAT_VERSION,
        "source": options.source,
        "revision": revision,
        "text_column": options.text_column,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "split": {
            "rule": "sha256(group)[:8] / 2^64 < val_fraction; a group is a file for code, else a document",
            "val_fraction": options.val_fraction,
            "overlap_tokens": OVERLAP_TOKENS,
        },
        "counts": dict(sorted(counts.items())),
        "files": {},
    }
