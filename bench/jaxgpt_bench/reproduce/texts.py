"""Texts: samples of fixed prompts and one fixed seed, and the loss on text from elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.overlap import OVERLAP_TOKENS
from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.quality.contestants import Contender, QualityOptions, contenders
from jaxgpt_bench.reproduce.memorization import Corpus, describe, longest_runs, overlap

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
