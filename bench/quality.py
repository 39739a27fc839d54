"""`jaxgpt-bench quality`: one table of models on identical tokens.

    jaxgpt-bench quality --run RUN --artifact FP32 INT8 ... --data DATA

The first row (the run's Flax model, or the first artifact) is the reference of the others. Loss is over
the whole validation split, or over windows spread evenly over it; samples continue the same prompts with the
same random numbers. Beside them the held-out documents' own code is parsed, cut at the same length.

The float32 artifact of a training with rounding is the row fp32-qat. int8-static-qat is compared with it
too: that is what its integers cost, apart from what the further training changed.
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
import numpy.typing as npt
import torch
from rich.table import Table

from bench.machine import provenance
from bench.markers import write_between_markers
from bench.words import signed
from export.artifact import Artifact, read_artifact
from export.certificate import read_certificate
from export.model import Session
from export.quality import Forward, Quality, batches, difference_error, measure_quality
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of, write_json
from jaxgpt.shared.generation import Engine, generate
from jaxgpt.shared.sampling import Sampling
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.tokens import Dataset, Tokens, open_dataset, windows

FENCE = "```"
CODE_BEGIN = "```python\n"
BATCH_ROWS = 8
SAMPLE_TEMPERATURE = 0.7
SPREAD = "spread evenly over the validation split"
QAT, QAT_PARENT = "int8-static-qat", "fp32-qat"


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Compare models on identical tokens.

    Attributes:
      artifact: artifact folders, float32 first; that of a training with rounding before what was made of it.
      data: dataset folder whose validation split is measured.
      run: run folder: its Flax model becomes the reference.
      step: of the run: best, latest, or a stored step.
      tokens: of the validation split, in whole windows spread evenly over it; 0 for all.
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
    """A model to compare: logits for tokens, an engine to sample with, its size in MB, its parent's row."""

    name: str
    forward: Forward
    engine: Engine
    size_mb: float
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The beginning of a validation document, and how the document goes on, up to the closing fence."""

    text: str
    rest: str


def row_name(artifact: Artifact) -> str:
    """Return the name of an artifact's row."""
    if artifact.quantization is not None:
        return artifact.kind
    return QAT_PARENT if artifact.trained else "torch-fp32"


def parent_name(artifact: Artifact, artifacts: Sequence[Artifact]) -> str | None:
    """Return the row that int8-static-qat was quantized from, where it is measured before it.

    Raises:
      UserError: it was quantized from another.
    """
    earlier = itertools.takewhile(lambda other: other is not artifact, artifacts)
    parent = next((other for other in earlier if row_name(other) == QAT_PARENT), None)
    if row_name(artifact) != QAT or parent is None:
        return None
    origin = read_certificate(artifact.folder)["origin"]
    if origin.get("parent_sha256") != sha256_of(parent.folder / "model.safetensors"):
        raise UserError(f"{artifact.folder} was not made of {parent.folder}; give what belongs together")
    return QAT_PARENT


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
        Contender(
            row_name(artifact),
            (model := artifact.model()),
            Session(model),
            artifact.file_bytes / 1e6,
            parent_name(artifact, artifacts),
        )
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


def spread_evenly(total: int, count: int) -> npt.NDArray[np.int64]:
    """Choose so many of 0 ... total - 1, first and last among them; all where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def sample_prompts(texts: Sequence[str], tokenizer: Tokenizer, count: int, longest: int) -> list[Prompt]:
    """Return prompts from documents evenly spread: all up to the code, where there is a fence.

    Args:
      texts: the validation documents.
      tokenizer: of the models.
      count: how many are wanted; fewer where fewer documents fit.
      longest: tokens a prompt may have; documents with a longer one are passed over.
    """
    found: list[Prompt] = []
    for text in texts:
        head, fence, rest = text.partition(CODE_BEGIN)
        if not fence:
            tokens = tokenizer.encode(text)
            head, rest = tokenizer.decode(tokens[: longest // 2]), tokenizer.decode(tokens[longest // 2 :])
        if len(tokenizer.encode(head + fence)) <= longest:
            found.append(Prompt(head + fence, rest.partition(FENCE)[0]))
    return [found[index] for index in spread_evenly(len(found), count)]


def val_documents(val: Tokens, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the validation split."""
    ends = np.flatnonzero(val == tokenizer.endoftext)
    pairs = itertools.pairwise(ends)
    return [tokenizer.decode(val[start + 1 : end].tolist()) for start, end in pairs]


def xz_bits_per_byte(content: bytes) -> float:
    """Return what `xz -9e` makes of a text, in bits a byte: a yardstick from outside."""
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


def held_out_texts(prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int) -> list[dict[str, Any]]:
    """Return how the prompts' documents go on themselves, cut where a sample would be."""
    texts = []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt.rest)
        text = tokenizer.decode(tokens[:longest])
        finish_reason = "length" if len(tokens) > longest else "stop"
        texts.append({"text": text, "finish_reason": finish_reason, "parses": parses(text)})
    return texts


def cut_count(texts: Sequence[dict[str, Any]]) -> int:
    """Count the texts that ended at the length limit."""
    return sum(text["finish_reason"] == "length" for text in texts)


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
