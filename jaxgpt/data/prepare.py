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
from typing import Any, Literal

from jaxgpt.data.documents import Document, Source, deduplicate, split, working_fraction
from jaxgpt.data.encode import answer_mask, encode, join, join_masks
from jaxgpt.data.make_tokenizer import check_tokenizer_name, is_bpe, make_tokenizer
from jaxgpt.data.overlap import OVERLAP_TOKENS, without_overlap
from jaxgpt.data.reading.columns import DEFAULT_COLUMN
from jaxgpt.data.requests.held_out import REASON
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.dataset import DATASET_FORMAT_VERSION, MASKED_FORMAT_VERSION, Mask, Tokens, pack_mask
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, only_writer, sha256_of, write_json
from jaxgpt.shared.machine import usable_cores
from jaxgpt.shared.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    r"""Turn source text into a dataset folder of tokens.

    Attributes:
      source: hub:NAME[@REVISION], stdlib, packages:NAME,..., or a path: a table (.jsonl, .json, .csv,
        and others), a text (.txt, .md, .rst), source code, or a folder of such files; what is
        compressed (.gz, .xz, .bz2, .zst) is read as what it holds.
      out: the dataset folder to write.
      tokenizer: gpt2, bpe:N (N tokens, trained on the training documents), or a folder whose tokenizer is
        taken (an artifact, a data set, a folder of Hugging Face).
      val_fraction: share of the groups (files for code, else documents) that go into validation.
      text_column: column of a table that holds the text.
      template: makes a text of several columns, such as '{instruction}\n{output}'; the last is the answer.
      code: what is taken of .py files: docstring -> code pairs, requests ("Write a function to ...") with
        their programs, or whole files, as of other source code.
      held_out: text file of requests, one a line; pairs that ask the same, in whatever words around it, are
        left out of training and validation.
      include: patterns, such as '*.md' 'src/*'; only files of a folder that fit one are read.
      exclude: patterns of files that are not read.
      skip_errors: leave out files and rows that are damaged; they are counted and named.
      answers_only: of pairs (.py files, a template of several columns) the loss counts the answer alone.
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
    text_column: str = DEFAULT_COLUMN
    template: str = ""
    code: Literal["pairs", "requests", "files"] = "pairs"
    held_out: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_errors: bool = False
    answers_only: bool = False
    threads: int = 0
    special: tuple[str, ...] = ()
    overwrite: bool = False
    json: bool = False

    @property
    def reading(self) -> ReadOptions:
        """How the source is read."""
        names = [field.name for field in dataclasses.fields(ReadOptions)]
        return ReadOptions(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split of the documents, as they are and as tokens, in the same order."""

    documents: list[Document]
    tokens: list[Tokens]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(len(document.text.encode()) for document in self.documents)


def prepare(options: PrepareOptions) -> Result:
    """Run `jaxgpt prepare`.

    Raises:
      UserError: the source can't be read, is empty, or leaves a split empty.
    """
    _check_options(options)
    with only_writer(options.out):
        return _prepare(options)


def _prepare(options: PrepareOptions) -> Result:
    source = open_source(options.source, options.reading)
    counts: Counter[str] = Counter()
    train, val = _split_documents(source, options, counts)
    tokenizer = _make_tokenizer(options.tokenizer, [each.text for each in train], options.special)
    threads = options.threads or usable_cores()
    splits = {
        name: Split(documents=documents, tokens=_encoded(documents, tokenizer, threads, name, options))
        for name, documents in (("train", train), ("val", val))
    }
    splits["val"] = _drop_overlap(splits["train"], splits["val"], tokenizer.endoftext, counts)
    manifest = _write(options, source, tokenizer, splits, counts)
    answers = ", the loss counts the answers alone" if options.answers_only else ""
    say(
        f"{options.out}: {counts['train_tokens']:,} training tokens "
        f"({counts['train_documents']:,} documents), "
        f"{counts['val_tokens']:,} validation tokens ({counts['val_documents']:,} documents; "
        f"{counts['val_overlapping']} dropped for sharing {OVERLAP_TOKENS} tokens with training), "
        f"vocabulary {tokenizer.vocab_size}{answers}"
    )
    return Result({**manifest, **source.report.figures()})


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
    if options.template and options.text_column != DEFAULT_COLUMN:
        raise UserError(
            f"--template and --text-column {options.text_column} both say which text; give one of them"
        )
    _ = options.reading.columns  # of a template


def _split_documents(
    source: Source, options: PrepareOptions, counts: Counter[str]
) -> tuple[list[Document], list[Document]]:
    """Read the source; return the documents of training and of validation, no text twice."""
    documents = deduplicate(source.documents, counts)
    if options.held_out is not None:
        counts["held_out_pairs"] = source.report.skipped[REASON]
    for line in source.report.lines():
        say(f"{options.source}: {line}")
    if not documents:
        left_out = source.report.summary()
        raise UserError(
            f"source {options.source!r} is empty: no document with text in it"
            f"{f' (left out: {left_out})' if left_out else ''}; check the path (of .py files "
            "only functions and classes with a docstring of 3 words or more and 3 lines of code are taken, "
            "or whole files with --code files)"
        )
    train, val = split(documents, options.val_fraction)
    if not train or not val:
        fraction = working_fraction(documents)
        other = "" if fraction is None else f" or --val-fraction {fraction:g}, which leaves both some"
        raise UserError(
            f"source {options.source!r} has {len(documents)} documents, and the split left "
            f"{len(train)} for training, {len(val)} for validation; give more text{other}"
        )
    if options.answers_only and (plain := next((d for d in documents if d.answer is None), None)):
        raise UserError(
            f"--answers-only needs pairs, and {plain.text[:40]!r}... is none; give .py files, or a table "
            "with a --template of several columns, the answer last"
        )
    say(f"{options.source}: {len(documents)} documents, {counts['duplicates']} duplicates left out")
    return train, val


def _make_tokenizer(name: str, train: list[str], special: Sequence[str]) -> Tokenizer:
    tokenizer = make_tokenizer(name, train, special)
    if is_bpe(name) and tokenizer.vocab_size < int(name.partition(":")[2]):
        say(f"{name}: the text has pairs for {tokenizer.vocab_size} tokens only")
    return tokenizer


def _encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, threads: int, name: str, options: PrepareOptions
) -> list[Tokens]:
    texts = [document.text for document in documents]
    return encode(texts, tokenizer, threads, f"encoding {name}", options.special)


def _drop_overlap(train: Split, val: Split, endoftext: int, counts: Counter[str]) -> Split:
    """Return the validation documents that share no long run of tokens with training."""
    kept = without_overlap(train.tokens, val.tokens, endoftext)
    counts["val_overlapping"] = len(val.documents) - len(kept)
    if not kept:
        raise UserError(
            f"every validation document shares {OVERLAP_TOKENS} tokens with training (what stands in all of "
            "them, such as a licence or the words of a template, counts too); give more text"
        )
    return Split(documents=[val.documents[i] for i in kept], tokens=[val.tokens[i] for i in kept])


def _write(
    options: PrepareOptions,
    source: Source,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    counts: Counter[str],
) -> dict[str, Any]:
    """Write the dataset folder; return its manifest."""
    files: dict[str, Tokens | Mask] = {}
    for name, each in splits.items():
        tokens = files[f"{name}.bin"] = join(each.tokens, tokenizer.endoftext)
        counts[f"{name}_documents"] = len(each.documents)
        counts[f"{name}_bytes"] = each.text_bytes
        counts[f"{name}_tokens"] = len(tokens)
        if options.answers_only:
            masks = [answer_mask(*pair, tokenizer) for pair in zip(each.documents, each.tokens, strict=True)]
            files[f"{name}.mask.bin"] = pack_mask(join_masks(masks))
            counts[f"{name}_answer_bytes"] = sum(
                len(document.text[document.answer :].encode()) for document in each.documents
            )
    with new_folder(options.out, options.overwrite, "manifest.json") as folder:
        tokenizer.save(folder)
        manifest = _manifest(options, source, tokenizer, counts)
        for name, array in files.items():
            path = folder / name
            array.tofile(path)
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(folder / "manifest.json", manifest)
    return manifest


def _manifest(
    options: PrepareOptions, source: Source, tokenizer: Tokenizer, counts: Counter[str]
) -> dict[str, Any]:
    # What is as it is unless it is asked for has no entry: the same text gives the same file as ever.
    asked = {
        name: list(value) if isinstance(value, tuple) else value.name if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options.reading).items()
        if name != "text_column" and value != getattr(ReadOptions(), name)
    }
    return {
        "format_version": MASKED_FORMAT_VERSION if options.answers_only else DATASET_FORMAT_VERSION,
        "source": options.source,
        "revision": source.revision,
        "text_column": options.text_column,
        **({"reading": asked} if asked else {}),
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
