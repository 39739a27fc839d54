"""What `jaxgpt-bench quality` measures: loss, KL divergence, top-1 agreement, and samples that parse."""

import lzma
import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxgpt_export.parity.quality import Forward, Quality, batches, difference_error, measure_quality
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from jaxgpt.shared.console import say, stderr
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import ParentDifference, QualityFigures, QualityRow, WrittenText
from jaxgpt_bench.common.tables import QUALITY, Table, computed_by, filled, table
from jaxgpt_bench.quality.contestants import ComparedModel, ComparedModels
from jaxgpt_bench.quality.samples import (
    held_out_texts,
    parse_count,
    sample_prompts,
    sample_texts,
    spread_evenly,
    val_documents,
)
from jaxgpt_bench.quality.statistics import change_figures

BATCH_ROWS = 8
SPREAD = "spread evenly over the validation split"
WHOLE = "all of the validation split"


def which_windows(chosen: int, total: int) -> str:
    """Say which windows of the validation split are measured, given how many of how many."""
    return WHOLE if chosen == total else SPREAD


def xz_bits_per_byte(content: bytes) -> float:
    """Return what `xz -9e` makes of a text, in bits a byte: a yardstick from outside."""
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def measured_on(
    models: Sequence[ComparedModel],
    inputs: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
    left_out: MutableMapping[str, str] | None = None,
) -> dict[str, Quality]:
    """Measure models on windows (see `dataset.windows`), in equal batches: one compilation.

    A bar counts a model's batches where stderr is a terminal. Models that fail: see `measure_quality`.
    """
    missing = -len(inputs) % BATCH_ROWS
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    parents = {model.name: model.parent for model in models if model.parent is not None}
    with progress() as bar:
        task = bar.add_task("", total=len(models) * len(inputs) // BATCH_ROWS)

        def counted(model: ComparedModel) -> Forward:
            def forward(tokens: Tensor) -> Tensor:
                bar.update(task, description=f"measuring {model.name}")
                logits = model.forward(tokens)
                bar.advance(task)
                return logits

            return forward

        return measure_quality(
            {model.name: counted(model) for model in models},
            batches(inputs, targets, BATCH_ROWS),
            parents,
            left_out,
        )


def progress() -> Progress:
    """Return a display of what runs and how far it is, on stderr where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def differences(model: ComparedModel, measured: dict[str, Quality]) -> dict[str, Any]:
    """Return what a model's loss is above that of the reference (the first), and above its own parent's.

    Returns:
      loss_increase, difference_error and parent of a row.
    """
    found, reference = measured[model.name], next(iter(measured.values()))
    parent: ParentDifference | None = None
    if model.parent is not None and found.parent is not None:
        theirs = measured[model.parent]
        parent = ParentDifference(
            name=model.parent,
            difference=found.loss - theirs.loss,
            difference_error=difference_error(found, theirs),
            kl_mean=found.parent.kl_mean,
            top1=found.parent.top1_agreement,
        )
    return {
        "loss_increase": found.loss - reference.loss,
        "difference_error": None if found is reference else difference_error(found, reference),
        "parent": parent,
    }


def quality_row(
    model: ComparedModel, measured: dict[str, Quality], val_bytes: int, written: Sequence[WrittenText]
) -> QualityRow:
    """Return a model's row.

    Args:
      model: whose row it is.
      measured: of every model, the reference first.
      val_bytes: that the predicted tokens are.
      written: its samples.
    """
    found = measured[model.name]
    parity, count, changes = found.parity, parse_count(written), change_figures(found)
    return QualityRow(
        name=model.name,
        val_loss=found.loss,
        **differences(model, measured),
        val_bits_per_byte=found.loss * found.tokens / math.log(2) / val_bytes,
        kl_mean=None if parity is None else parity.kl_mean,
        kl_max=None if parity is None else parity.kl_max,
        max_abs_logit_diff=None if parity is None else parity.max_abs_logit_diff,
        top1_agreement=1.0 if parity is None else parity.top1_agreement,
        **({} if changes is None else vars(changes)),
        parse_share=count.parse / count.texts if count.texts else None,
        parse_cut=count.cut,
        size_mb=model.size_mb,
        settings=model.settings,
        engine=model.engine,
    )


def measure_quality_of(
    compared: ComparedModels,
    dataset: Dataset,
    tokens: int,
    samples: int,
    sample_tokens: int,
    left_out: dict[str, str] | None = None,
) -> QualityFigures:
    """Measure models on the same windows, and let each that has a session continue the same prompts.

    Args:
      compared: the models.
      dataset: whose validation split is taken.
      tokens: of it at most, in whole windows spread evenly over it; 0 for all.
      samples: texts of each model.
      sample_tokens: their length at most.
      left_out: programs that could not be measured, with why; where it is not None, models that fail are
        left out too, but for those that others are compared with.
    """
    models, tokenizer, block_size = compared.models, compared.tokenizer, compared.block_size
    inputs, targets = dataset.val_windows(block_size)
    chosen = spread_evenly(len(inputs), -(-tokens // block_size) or len(inputs))
    windows = which_windows(len(chosen), len(inputs))
    inputs, targets = inputs[chosen], targets[chosen]
    predicted = targets[targets >= 0].tolist()
    say(f"measuring {len(models)} models on {len(predicted):,} tokens")
    failed: dict[str, str] | None = None if left_out is None else {}
    measured = measured_on(models, inputs, targets, failed)
    for name, why in (failed or {}).items():
        say(f"{name} is left out: {why}")
    models = [model for model in models if model.name in measured]
    content = b"".join(tokenizer.token_bytes(token) for token in predicted)
    prompts = sample_prompts(val_documents(dataset.val, tokenizer), tokenizer, samples, block_size // 2)
    texts = [prompt.text for prompt in prompts]
    held_out = held_out_texts(prompts, tokenizer, sample_tokens)
    written = samples_of(models, tokenizer, texts, sample_tokens)
    return QualityFigures(
        **vars(provenance()),
        reference=models[0].name,
        val_tokens=len(predicted),
        val_bytes=len(content),
        windows=windows,
        xz_bits_per_byte=xz_bits_per_byte(content),
        left_out=None if left_out is None else {**left_out, **(failed or {})},
        rows=tuple(
            quality_row(model, measured, len(content), written.get(model.name, [])) for model in models
        ),
        parse_held_out=parse_count(held_out),
        prompts=tuple(texts),
        held_out=tuple(held_out),
        samples={name: tuple(each) for name, each in written.items()},
    )


def samples_of(
    models: Sequence[ComparedModel], tokenizer: Tokenizer, prompts: Sequence[str], sample_tokens: int
) -> dict[str, list[WrittenText]]:
    """Let every model that has a session continue each prompt; a bar counts the texts."""
    written: dict[str, list[WrittenText]] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(prompts) * sum(model.session is not None for model in models))
        for model in models:
            if model.session is None:
                continue
            bar.update(task, description=f"{model.name} writes")
            written[model.name] = []
            for text in sample_texts(model.session, tokenizer, prompts, sample_tokens):
                written[model.name].append(text)
                bar.advance(task)
    return written


def quality_table(figures: QualityFigures) -> Table:
    """Return the rows as a table, with the columns that they have."""
    return table(filled(QUALITY, figures.rows), figures.rows)


def markdown_block(figures: QualityFigures) -> str:
    """Return the rows as Markdown, with what they were measured on."""
    where = f", {figures.windows}" if figures.windows else ""  # files of earlier versions have none
    by = f" Logits by {computed_by(figures.rows)}." if computed_by(figures.rows) else ""
    return (
        f"{figures.val_tokens:,} held-out tokens{where} ({figures.val_bytes:,} bytes; xz -9e "
        f"{figures.xz_bits_per_byte:.3f} bits a byte), against {figures.reference}; {figures.date}, "
        f"commit {figures.commit}, {figures.machine.cpu}.{by}\n\n{quality_table(figures).markdown()}"
    )
