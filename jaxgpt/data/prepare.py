"""`jaxgpt prepare`: source text -> dataset folder.

    jaxgpt prepare --source stdlib --tokenizer bpe:1024 --out data/stdlib

The stages: read the source, keep one of equal documents, split by document (for code by file), train the
tokenizer on the training documents, encode, drop validation documents that share 50 consecutive tokens with
training, write. The folder appears whole or not at all; shared/dataset.py reads it.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.documents import Source, deduplicate, split
from jaxgpt.data.encode import encode, join
from jaxgpt.data.make_tokenizer import check_tokenizer_name, is_bpe, make_tokenizer
from jaxgpt.data.overlap import OVERLAP_TOKENS, without_overlap
from jaxgpt.data.sources import open_source
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import DATASET_FORMAT_VERSION, Tokens
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of, write_json
from jaxgpt.shared.machine import usable_cores
from jaxgpt.shared.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Turn source text into a dataset folder of tokens.

    Attributes:
      source: hub:NAME[@REVISION], stdlib, packages:NAME,..., or a .jsonl, .json, .parquet, .txt or .py
        file or a folder of such files (.py files give docstring -> code pairs); all but .parquet may be
        compressed: .jsonl.xz, .txt.gz, .py.zst.
      out: the dataset folder to write.
      tokenizer: gpt2, bpe:N (N tokens, trained on the training documents), or a folder whose tokenizer is
        taken (an artifact, a data set, a folder of Hugging Face).
      val_fraction: share of the groups (files for code, else documents) that go into validation.
      text_column: column of a table that holds the text.
      threads: threads that encode; 0 takes one for each core that this process may use.
      special: reserved tokens, such as '<|user|>': each is one token where a document has it written out;
        bpe:N counts them in N, other tokenizers get them after their last token.
      overwrite: replace an earlier dataset folder.
      json: print one JSON document with all figures on stdout.
    """

    out: Path
    source: str = "hub"
    tokenizer: str = "gpt2"
    val_fraction: float = 0.05
    text_column: str = "text"
    threads: int = 0
    special: tuple[str, ...] = ()
    overwrite: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split of the documents, as texts and as tokens, in the same order."""

    texts: list[str]
    tokens: list[Tokens]


def prepare(options: PrepareOptions) -> Result:
    """Run `jaxgpt prepare`.

    Raises:
      UserError: the source can't be read, is empty, or leaves a split empty.
    """
    _check_options(options)
    source = open_source(options.source, options.text_column)
    counts: Counter[str] = Counter()
    train_texts, val_texts = _split_documents(source, options, counts)
    tokenizer = _make_tokenizer(options.tokenizer, train_texts, options.special)
    threads = options.threads or usable_cores()
    splits = {
        name: Split(
            texts=texts, tokens=encode(texts, tokenizer, threads, f"encoding {name}", options.special)
        )
        for name, texts in (("train", train_texts), ("val", val_texts))
    }
    splits["val"] = _drop_overlap(splits["train"], splits["val"], tokenizer.endoftext, counts)
    manifest = _write(options, source.revision, tokenizer, splits, counts)
    say(
        f"{options.out}: {counts['train_tokens']:,} training tokens "
        f"({counts['train_documents']:,} documents), "
        f"{counts['val_tokens']:,} validation tokens ({counts['val_documents']:,} documents; "
        f"{counts['val_overlapping']} dropped for sharing {OVERLAP_TOKENS} tokens with training), "
        f"vocabulary {tokenizer.vocab_size}"
    )
    return Result(manifest)


def _check_options(options: PrepareOptions) -> None:
    """Raise UserError for what can be seen before the source is opened."""
    check_tokenizer_name(options.tokenizer, options.special)
    inputs = [Path(options.source or ".")]
    if options.tokenizer != "gpt2" and not is_bpe(options.tokenizer):
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "manifest.json", inputs)
    if options.threads < 0:
        raise UserError(f"threads ({options.threads}) must be 0 (all that there are) or more")
    if not 0.0 < options.val_fraction < 1.0:
        raise UserError(f"val_fraction ({options.val_fraction}) must lie between 0 and 1")


def _split_documents(
    source: Source, options: PrepareOptions, counts: Counter[str]
) -> tuple[list[str], list[str]]:
    """Read the source; return the texts of training and of validation, no text twice."""
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
    return train, val


def _make_tokenizer(name: str, train: list[str], special: Sequence[str]) -> Tokenizer:
    tokenizer = make_tokenizer(name, train, special)
    if is_bpe(name) and tokenizer.vocab_size < int(name.partition(":")[2]):
        say(f"{name}: the text has pairs for {tokenizer.vocab_size} tokens only")
    return tokenizer


def _drop_overlap(train: Split, val: Split, endoftext: int, counts: Counter[str]) -> Split:
    """Return the validation documents that share no long run of tokens with training."""
    kept = without_overlap(train.tokens, val.tokens, endoftext)
    counts["val_overlapping"] = len(val.texts) - len(kept)
    if not kept:
        raise UserError(
            f"every validation document shares {OVERLAP_TOKENS} tokens with training; give more text"
        )
    return Split(texts=[val.texts[i] for i in kept], tokens=[val.tokens[i] for i in kept])


def _write(
    options: PrepareOptions,
    revision: str,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    counts: Counter[str],
) -> dict[str, Any]:
    """Write the dataset folder; return its manifest."""
    arrays = {name: join(each.tokens, tokenizer.endoftext) for name, each in splits.items()}
    for name, each in splits.items():
        counts[f"{name}_documents"] = len(each.texts)
        counts[f"{name}_bytes"] = sum(len(text.encode()) for text in each.texts)
        counts[f"{name}_tokens"] = len(arrays[name])
    with new_folder(options.out, options.overwrite, "manifest.json") as folder:
        tokenizer.save(folder)
        manifest = _manifest(options, revision, tokenizer, counts)
        for name, array in arrays.items():
            path = folder / f"{name}.bin"
            array.tofile(path)
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(folder / "manifest.json", manifest)
    return manifest


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
            **({"special": list(options.special)} if options.special else {}),
        },
        "split": {
            "rule": "sha256(group)[:8] / 2^64 < val_fraction; a group is a file for code, else a document",
            "val_fraction": options.val_fraction,
            "overlap_tokens": OVERLAP_TOKENS,
        },
        "counts": dict(sorted(counts.items())),
        "files": {},
    }
