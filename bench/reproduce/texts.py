"""Texts: samples of fixed prompts and one fixed seed, and the loss on text from elsewhere."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality import (
    Contender,
    QualityOptions,
    contenders,
    differences,
    measured_on,
    xz_bits_per_byte,
)
from bench.reproduce.memorization import Corpus, describe, longest_runs, overlap
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
    inputs, targets = windows(tokens, min(block_size, len(tokens) - 1))  # a short text is one short window
    say(f"measuring {len(models)} models on {len(tokens) - 1:,} tokens of {other.path.name}")
    found = measured_on(models, inputs, targets)
    content = "".join(texts).encode()
    shared = overlap(corpus, tokens, tokenizer.endoftext, OVERLAP_TOKENS)
    return {
        "file": other.path.name,
        "about": other.about,
        "documents": shared["documents"],
        "tokens": found[models[0].name].tokens,
        "bytes": len(content),
        "documents_shared_with_training": shared["sharing"],
        "documents_too_short_to_tell": shared["too_short"],
        "xz_bits_per_byte": xz_bits_per_byte(content),
        "rows": [
            {
                "name": model.name,
                "loss": found[model.name].loss,
                **differences(model, found),
                "bits_per_byte": found[model.name].loss * found[model.name].tokens
                / math.log(2) / len(content),
            }
            for model in models
        ],
    }  # fmt: skip


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
) -> dict[str, Any]:
    """Measure what generated and held-out texts have word for word from the training split.

    Args:
      corpus: the training split.
      dataset: whose validation split is counted again.
      tokenizer: of the models.
      sampled: what `samples` gave.
      quality: what `jaxgpt-bench quality` gave, with the samples whose parsing is counted, and how their
        held-out documents go on, the yardstick.
    """
    say("counting overlaps of validation and training")
    shared = overlap(corpus, dataset.val, tokenizer.endoftext, OVERLAP_TOKENS)
    if "val_overlapping" in dataset.manifest["counts"]:
        shared["dropped"] = dataset.manifest["counts"]["val_overlapping"]
    written = [row["tokens"] for row in sampled["samples"]]
    groups = {"held-out": quality["held_out"], **quality["samples"]}
    lists = {name: [tokenizer.encode(row["text"]) for row in rows] for name, rows in groups.items()}
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
        "overlap": {"run_tokens": OVERLAP_TOKENS, **shared},
        "train_tokens": len(corpus.tokens),
        "runs": runs,
        "summary": summary,
    }
