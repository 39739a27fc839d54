"""`jaxgpt-bench quality`: one table of models on identical tokens.

    jaxgpt-bench quality --run RUN --artifact FP32 INT8 ... --data DATA

The first row (the run's Flax model, or the first artifact) is the reference of the others. Loss is over
the whole validation split; samples continue the same prompts with the same random numbers.
"""

import ast
import dataclasses
import itertools
import lzma
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.machine import provenance
from bench.markers import write_between_markers
from export.artifact import Artifact, read_artifact
from export.model import Session
from export.quality import Forward, batches, measure_quality
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.generation import Engine, generate
from jaxgpt.shared.sampling import Sampling
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.tokens import Dataset, Tokens, open_dataset, windows

FENCE = "```"
CODE_BEGIN = "```python\n"
BATCH_ROWS = 8
SAMPLE_TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Compare models on identical tokens.

    Attributes:
      artifact: artifact folders, float32 first.
      data: dataset folder whose validation split is measured.
      run: run folder: its Flax model becomes the reference.
      step: of the run: best, latest, or a stored step.
      tokens: of the validation split, from its beginning, in whole windows; 0 for all.
      samples: texts to generate from each model.
      sample_tokens: length of a sample at most.
      out: also write the figures into this JSON file.
      table: text whose table between the markers `<!-- quality: begin -->` and `end` is written anew.
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...]
    data: Path
    run: Path | None = None
    step: str = "best"
    tokens: int = 0
    samples: int = 24
    sample_tokens: int = 200
    out: Path | None = None
    table: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model to compare: logits for tokens, an engine to sample with, its size in MB."""

    name: str
    forward: Forward
    engine: Engine
    size_mb: float


def row_name(artifact: Artifact) -> str:
    """Return the name of an artifact's row."""
    return "torch-fp32" if artifact.quantization is None else artifact.kind


def flax_contender(folder: Path, which: str) -> tuple[Contender, Tokenizer]:
    """Return a run's Flax model; its size is that of its parameters in float32."""
    import jax

    from jaxgpt.checkpoints import load_params
    from jaxgpt.model import graph_of, merge
    from jaxgpt.runs import open_run
    from jaxgpt.sample import JaxEngine

    run = open_run(folder)
    model = run.config.model
    _, params = load_params(run, which)
    graph = graph_of(model)
    compiled = jax.jit(lambda params, tokens: merge(graph, params)(tokens))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        with jax.default_matmul_precision("highest"):
            return torch.from_numpy(np.array(compiled(params, tokens.int().numpy())))

    size_mb = sum(leaf.nbytes for leaf in params.values()) / 1e6
    return Contender("flax-fp32", forward, JaxEngine(model, params), size_mb), run.tokenizer


def contenders(options: QualityOptions, dataset: Dataset) -> tuple[list[Contender], Tokenizer, int]:
    """Open every model; UserError when two do not share tokenizer, vocabulary and context."""
    artifacts = [read_artifact(folder) for folder in options.artifact]
    if not artifacts:
        raise UserError("quality needs at least one --artifact")
    found = [
        Contender(row_name(artifact), (model := artifact.model()), Session(model), artifact.file_bytes / 1e6)
        for artifact in artifacts
    ]
    tokenizers = [artifact.tokenizer() for artifact in artifacts]
    if options.run is not None:
        flax, tokenizer = flax_contender(options.run, options.step)
        found.insert(0, flax)
        tokenizers.insert(0, tokenizer)
    if len({t.sha256 for t in tokenizers} | {dataset.tokenizer_sha256}) != 1:
        raise UserError("tokenizers of data, run and artifacts differ; give what belongs together")
    blocks = {artifact.config.block_size for artifact in artifacts}
    if len(blocks) != 1 or len({c.name for c in found}) != len(found):
        raise UserError("artifacts must be of one model, each of another kind")
    return found, tokenizers[0], blocks.pop()


def sample_prompts(texts: Sequence[str], tokenizer: Tokenizer, count: int, longest: int) -> list[str]:
    """Return prompts from documents evenly spread: all up to the code, where there is a fence.

    Args:
      texts: the validation documents.
      tokenizer: of the models.
      count: how many are wanted; fewer where fewer documents fit.
      longest: tokens a prompt may have; documents with a longer one are passed over.
    """
    found: list[str] = []
    for text in texts:
        head, fence, _ = text.partition(CODE_BEGIN)
        prompt = head + fence if fence else tokenizer.decode(tokenizer.encode(text)[: longest // 2])
        if len(tokenizer.encode(prompt)) <= longest:
            found.append(prompt)
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[index] for index in chosen]


def val_documents(val: Tokens, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the validation split."""
    ends = np.flatnonzero(val == tokenizer.endoftext)
    pairs = itertools.pairwise(ends)
    return [tokenizer.decode(val[start + 1 : end].tolist()) for start, end in pairs]


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Return what `xz -9e` makes of joined texts, in bits a byte: a yardstick from outside."""
    content = "".join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def parses(code: str) -> bool:
    """Whether a text is Python: non-empty and accepted by ast.parse."""
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def sample_texts(
    contender: Contender, tokenizer: Tokenizer, prompts: Sequence[str], sample_tokens: int
) -> list[dict[str, Any]]:
    """Continue each prompt up to the closing fence; the seed is the prompt's number."""
    texts = []
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(temperature=SAMPLE_TEMPERATURE, seed=seed)
        done = generate(contender.engine, tokenizer, prompt, sample_tokens, sampling, stop=[FENCE])
        texts.append({"text": done.text, "finish_reason": done.finish_reason, "parses": parses(done.text)})
    return texts


def quality(options: QualityOptions) -> Result:
    """Run `jaxgpt-bench quality`."""
    dataset = open_dataset(options.data)
    models, tokenizer, block_size = contenders(options, dataset)
    inputs, targets = windows(dataset.val, block_size)
    if options.tokens < 0:
        raise UserError(f"--tokens ({options.tokens}) must be 0 (all) or more")
    rows_wanted = -(-options.tokens // block_size) or None
    inputs, targets = inputs[:rows_wanted], targets[:rows_wanted]
    missing = -len(inputs) % BATCH_ROWS  # equal batches: one compilation
    inputs = np.pad(inputs, ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    say(f"measuring {len(models)} models on {int((targets >= 0).sum()):,} tokens")
    measured = measure_quality({m.name: m.forward for m in models}, batches(inputs, targets, BATCH_ROWS))
    val_tokens = measured[models[0].name].tokens
    val_bytes = sum(len(tokenizer.token_bytes(int(token))) for token in dataset.val[1 : val_tokens + 1])
    texts = val_documents(dataset.val[: val_tokens + 1], tokenizer)
    prompts = sample_prompts(texts, tokenizer, options.samples, block_size // 2)
    reference_loss = measured[models[0].name].loss
    rows, samples = [], {}
    for model in models:
        found = measured[model.name]
        samples[model.name] = written = sample_texts(model, tokenizer, prompts, options.sample_tokens)
        rows.append(
            {
                "name": model.name,
                "val_loss": found.loss,
                "loss_increase": found.loss - reference_loss,
                "val_bits_per_byte": found.loss * found.tokens / math.log(2) / val_bytes,
                "kl_mean": None if found.parity is None else found.parity.kl_mean,
                "kl_max": None if found.parity is None else found.parity.kl_max,
                "max_abs_logit_diff": None if found.parity is None else found.parity.max_abs_logit_diff,
                "top1_agreement": 1.0 if found.parity is None else found.parity.top1_agreement,
                "parse_share": sum(text["parses"] for text in written) / len(written) if written else None,
                "size_mb": model.size_mb,
            }
        )
    stderr.print(quality_table(rows))
    figures = {
        **provenance(),
        "reference": models[0].name,
        "val_tokens": val_tokens,
        "val_bytes": val_bytes,
        "xz_bits_per_byte": xz_bits_per_byte(texts),
        "rows": rows,
        "prompts": prompts,
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
    lines = [
        f"{figures['val_tokens']:,} held-out tokens ({figures['val_bytes']:,} bytes; xz -9e "
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
    """Format a row: model, loss, difference, KL mean, KL max, top-1, share that parses, MB."""
    reference = row["kl_mean"] is None
    return [
        row["name"],
        f"{row['val_loss']:.4f}",
        "" if reference else f"{row['loss_increase']:+.5f}",
        "" if reference else f"{row['kl_mean']:.1e}",
        "" if reference else f"{row['kl_max']:.1e}",
        "" if reference else f"{row['top1_agreement']:.2%}",
        "" if row["parse_share"] is None else f"{row['parse_share']:.0%}",
        f"{row['size_mb']:.2f}",
    ]
