"""`jaxgpt-bench quality`: one table of models on identical tokens.

    jaxgpt-bench quality --run RUN --artifact FP32 INT8 ... --data DATA

The first row (the run's Flax model, or the first artifact) is the reference of the others. Loss is over
the whole validation split, or over windows spread evenly over it; samples continue the same prompts with the
same random numbers. Beside them the held-out documents' own code is parsed, cut at the same length.

The float32 artifact of a training with rounding is the row fp32-qat. int8-static-qat is compared with it
too: that is what its integers cost, apart from what the further training changed.
"""

import lzma
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxgpt_export.parity.quality import Quality, batches, difference_error, measure_quality
from rich.table import Table

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt_bench.common.formatting import signed
from jaxgpt_bench.common.markdown_blocks import write_between_markers
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.quality.contestants import Contender, QualityOptions, contenders
from jaxgpt_bench.quality.samples import (
    cut_count,
    held_out_texts,
    sample_prompts,
    sample_texts,
    spread_evenly,
    val_documents,
)

BATCH_ROWS = 8
SPREAD = "spread evenly over the validation split"


def xz_bits_per_byte(content: bytes) -> float:
    """Return what `xz -9e` makes of a text, in bits a byte: a yardstick from outside."""
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def measured_on(
    models: Sequence[Contender], inputs: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
) -> dict[str, Quality]:
    """Measure models on windows (see `tokens.windows`), in equal batches: one compilation."""
    missing = -len(inputs) % BATCH_ROWS
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    parents = {model.name: model.parent for model in models if model.parent is not None}
    return measure_quality(
        {model.name: model.forward for model in models}, batches(inputs, targets, BATCH_ROWS), parents
    )


def differences(model: Contender, measured: dict[str, Quality]) -> dict[str, Any]:
    """Return what a model's loss is above that of the reference (the first), and above its own parent's."""
    found, reference = measured[model.name], next(iter(measured.values()))
    row: dict[str, Any] = {
        "loss_increase": found.loss - reference.loss,
        "difference_error": None if found is reference else difference_error(found, reference),
    }
    if model.parent is not None and found.parent is not None:
        parent = measured[model.parent]
        row["parent"] = {
            "name": model.parent,
            "difference": found.loss - parent.loss,
            "difference_error": difference_error(found, parent),
            "kl_mean": found.parent.kl_mean,
            "top1": found.parent.top1_agreement,
        }
    return row


def quality(options: QualityOptions) -> Result:
    """Run `jaxgpt-bench quality`."""
    dataset = open_dataset(options.data)
    models, tokenizer, block_size = contenders(options, dataset)
    inputs, targets = windows(dataset.val, block_size)
    if options.tokens < 0:
        raise UserError(f"--tokens ({options.tokens}) must be 0 (all) or more")
    chosen = spread_evenly(len(inputs), -(-options.tokens // block_size) or len(inputs))
    inputs, targets = inputs[chosen], targets[chosen]
    predicted = targets[targets >= 0].tolist()
    say(f"measuring {len(models)} models on {len(predicted):,} tokens")
    measured = measured_on(models, inputs, targets)
    content = b"".join(tokenizer.token_bytes(token) for token in predicted)
    prompts = sample_prompts(
        val_documents(dataset.val, tokenizer), tokenizer, options.samples, block_size // 2
    )
    texts = [prompt.text for prompt in prompts]
    held_out = held_out_texts(prompts, tokenizer, options.sample_tokens)
    rows, samples = [], {}
    for model in models:
        found = measured[model.name]
        samples[model.name] = written = sample_texts(model, tokenizer, texts, options.sample_tokens)
        rows.append(
            {
                "name": model.name,
                "val_loss": found.loss,
                **differences(model, measured),
                "val_bits_per_byte": found.loss * found.tokens / math.log(2) / len(content),
                "kl_mean": None if found.parity is None else found.parity.kl_mean,
                "kl_max": None if found.parity is None else found.parity.kl_max,
                "max_abs_logit_diff": None if found.parity is None else found.parity.max_abs_logit_diff,
                "top1_agreement": 1.0 if found.parity is None else found.parity.top1_agreement,
                "parse_share": sum(text["parses"] for text in written) / len(written) if written else None,
                "parse_cut": cut_count(written),
                "size_mb": model.size_mb,
            }
        )
    stderr.print(quality_table(rows))
    figures = {
        **provenance(),
        "reference": models[0].name,
        "val_tokens": len(predicted),
        "val_bytes": len(content),
        "windows": SPREAD,
        "xz_bits_per_byte": xz_bits_per_byte(content),
        "rows": rows,
        "parse_held_out": {
            "texts": len(held_out),
            "parse": sum(text["parses"] for text in held_out),
            "cut": cut_count(held_out),
        },
        "prompts": texts,
        "held_out": held_out,
        "samples": samples,
    }
    if options.out is not None:
        write_json(options.out, figures)
    if options.table is not None:
        write_between_markers(options.table, "quality", markdown_table(figures))
    return Result(figures)


def markdown_table(figures: dict[str, Any]) -> str:
    """Return the rows as Markdown, with what they were measured on."""
    machine = figures["machine"]
    where = f", {figures['windows']}" if "windows" in figures else ""  # files of earlier versions have none
    lines = [
        f"{figures['val_tokens']:,} held-out tokens{where} ({figures['val_bytes']:,} bytes; xz -9e "
        f"{figures['xz_bits_per_byte']:.3f} bits a byte), against {figures['reference']}; {figures['date']}, "
        f"commit {figures['commit']}, {machine['cpu']}.",
        "",
        "| model | validation loss | difference | KL mean | KL max | top-1 | parses | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(quality_cells(row)) + " |" for row in figures["rows"])])


def quality_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out for a terminal."""
    titles = ("model", "val loss", "difference", "KL mean", "KL max", "top-1", "parses", "MB")
    table = Table(*titles)
    for row in rows:
        table.add_row(*quality_cells(row))
    return table


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Format a row: model, loss, difference with its error, KL mean, KL max, top-1, share that parses, MB."""
    reference = row["kl_mean"] is None
    error = row.get("difference_error") or 0.0  # files of earlier versions have none
    shown = f" ± {error:.5f}" if error >= 5e-6 else ""
    return [
        row["name"],
        f"{row['val_loss']:.4f}",
        "" if reference else signed(row["loss_increase"]) + shown,
        "" if reference else f"{row['kl_mean']:.1e}",
        "" if reference else f"{row['kl_max']:.1e}",
        "" if reference else f"{row['top1_agreement']:.2%}",
        "" if row["parse_share"] is None else f"{row['parse_share']:.0%}",
        f"{row['size_mb']:.2f}",
    ]
