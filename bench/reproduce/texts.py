"""Texts: samples of fixed prompts and one fixed seed, and the loss on text from elsewhere."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality import (
    BATCH_ROWS,
    FENCE,
    Contender,
    QualityOptions,
    contenders,
    val_documents,
    xz_bits_per_byte,
)
from bench.reproduce.memorization import Corpus, describe, longest_runs, shared_documents
from export.quality import batches, measure_quality
from jaxgpt.data.prepare import OVERLAP_TOKENS, encode, join
from jaxgpt.data.sources import load_table, table_documents
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.generation import generate
from jaxgpt.shared.sampling import Sampling
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.tokens import Dataset, windows

# The first is the original's; the others were written down before any model was asked.
PROMPTS = (
    "Python program to calculate the average",
    "Write a function to reverse a string",
    "Read a CSV file and print its rows",
    "Return the largest value of a list",
    "Check whether a number is prime",
    "Sort a list of dictionaries by a key",
)
SEED = 0
TEMPERATURES = (0.0, 0.8)
SAMPLED = ("torch-fp32", "int8-dynamic")


@dataclasses.dataclass(frozen=True)
class OtherText:
    """A table of text from another distribution.

    Attributes:
      path: .jsonl with a column `text`.
      about: what its user says of it.
    """

    path: Path
    about: str

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return sha256_of(self.path)


def parse_other(given: str) -> OtherText:
    """Read an --other-text: a path, or PATH=WORDS.

    Raises:
      UserError: there is no such file.
    """
    path, _, about = (given, "", "") if Path(given).is_file() else given.partition("=")
    if not Path(path).is_file():
        raise UserError(f"--other-text {path} is no file; give FILE.jsonl, or 'FILE.jsonl=what it is'")
    return OtherText(Path(path), about.strip())


def other_documents(other: OtherText) -> list[str]:
    """Return the texts of a table.

    Raises:
      UserError: it is no table, has no column `text`, or no text in it.
    """
    table = load_table([str(other.path)])
    texts = [document.text.strip() for document in table_documents(table, "text", str(other.path))]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"--other-text {other.path} holds no text; give a table with a column text")
    return texts


def samples(models: Sequence[Contender], tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """Continue every prompt with every model, greedily and by chance, each with the same seed.

    Args:
      models: those named in SAMPLED are taken.
      tokenizer: of the models.
      tokens: of a text at most; it ends earlier with the document.
    """
    rows = []
    chosen = [model for model in models if model.name in SAMPLED]
    for prompt in PROMPTS:
        for temperature in TEMPERATURES:
            for model in chosen:
                done = generate(model.engine, tokenizer, prompt, tokens, Sampling(temperature, seed=SEED))
                rows.append(
                    {
                        "prompt": prompt,
                        "temperature": temperature,
                        "model": model.name,
                        "text": done.text,
                        "tokens": [token for token in done.tokens if token != tokenizer.endoftext],
                        "finish_reason": done.finish_reason,
                    }
                )
    return {"seed": SEED, "longest": tokens, "samples": rows}


def loss_on(other: OtherText, models: Sequence[Contender], tokenizer: Tokenizer, block_size: int,
            corpus: Corpus) -> dict[str, Any]:  # fmt: skip
    """Measure every model on text from elsewhere, and how much of that text is in the training split."""
    texts = other_documents(other)
    tokens = join(encode(texts, tokenizer, 1, other.path.name), tokenizer.endoftext)
    if len(tokens) < block_size + 1:
        raise UserError(
            f"--other-text {other.path} has {len(tokens)} tokens, at least {block_size + 1} are needed"
        )
    inputs, targets = windows(tokens, block_size)
    missing = -len(inputs) % BATCH_ROWS
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    say(f"measuring {len(models)} models on {len(tokens) - 1:,} tokens of {other.path.name}")
    found = measure_quality({m.name: m.forward for m in models}, batches(inputs, targets, BATCH_ROWS))
    size = sum(len(text.encode()) for text in texts)
    documents, shared = shared_documents(corpus, tokens, tokenizer.endoftext, OVERLAP_TOKENS)
    reference = found[models[0].name].loss
    return {
        "file": other.path.name,
        "documents": documents,
        "tokens": found[models[0].name].tokens,
        "bytes": size,
        "documents_shared_with_training": shared,
        "xz_bits_per_byte": xz_bits_per_byte(texts),
        "rows": [
            {
                "name": name,
                "loss": quality.loss,
                "loss_increase": quality.loss - reference,
                "bits_per_byte": quality.loss * quality.tokens / math.log(2) / size,
            }
            for name, quality in found.items()
        ],
    }


def open_models(
    artifacts: Sequence[Path], run: Path, dataset: Dataset
) -> tuple[list[Contender], Tokenizer, int]:
    """Open the run's model and its artifacts."""
    return contenders(QualityOptions(tuple(artifacts), dataset.folder, run), dataset)


def word_for_word(
    corpus: Corpus,
    dataset: Dataset,
    tokenizer: Tokenizer,
    sampled: dict[str, Any],
    quality: dict[str, Any],
    longest: int,
) -> dict[str, Any]:
    """Measure what generated and held-out texts have word for word from the training split.

    Args:
      corpus: the training split.
      dataset: whose validation split is counted again, and whose texts are the yardstick.
      tokenizer: of the models.
      sampled: what `samples` gave.
      quality: what `jaxgpt-bench quality` gave, with the samples whose parsing is counted.
      longest: tokens of those samples, and of the held-out texts, at most.
    """
    say("counting overlaps of validation and training")
    documents, shared = shared_documents(corpus, dataset.val, tokenizer.endoftext, OVERLAP_TOKENS)
    groups = {name: [row["text"] for row in rows] for name, rows in quality["samples"].items()}
    written = [row["tokens"] for row in sampled["samples"]]
    yardstick = list(_held_out(dataset, tokenizer, quality["prompts"], longest))
    lists = {"held-out": yardstick, **{name: [tokenizer.encode(text) for text in texts]
             for name, texts in groups.items()}}  # fmt: skip
    everything = [*written, *(text for texts in lists.values() for text in texts)]
    say(f"looking for the longest run of {len(everything)} texts in {len(corpus.tokens):,} tokens")
    found = longest_runs(corpus, everything)
    runs = [
        {"start": start, "tokens": length, "text": tokenizer.decode(text[start : start + length])}
        for text, (start, length) in zip(written, found, strict=False)
    ]
    summary, at = [], len(written)
    for name, texts in lists.items():
        summary.append({"name": name, **describe(texts, found[at : at + len(texts)])})
        at += len(texts)
    return {
        "overlap": {"run_tokens": OVERLAP_TOKENS, "documents": documents, "sharing": shared},
        "train_tokens": len(corpus.tokens),
        "runs": runs,
        "summary": summary,
    }


def _held_out(
    dataset: Dataset, tokenizer: Tokenizer, prompts: Sequence[str], longest: int
) -> Iterator[list[int]]:
    """Yield how the validation documents that the prompts were taken from go on, as far as a sample may."""
    left = list(prompts)
    for text in val_documents(dataset.val, tokenizer):
        if left and text.startswith(left[0]):
            yield tokenizer.encode(text.removeprefix(left.pop(0)).partition(FENCE)[0])[:longest]
