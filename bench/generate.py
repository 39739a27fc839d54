"""`jaxgpt-bench generate`: tokens a second, beside the ceiling that the memory sets.

    jaxgpt-bench generate --artifact ART... --tokens 250
    jaxgpt-bench generate --preset gpt2 --peers            (random weights: speed does not depend on them)

Every engine runs in a process of its own; in each round all of them generate once, one after the other,
so that a slow moment of the machine hits none alone. The ceiling is measured read bandwidth / bytes of
weights a token; reading a buffer of just that size is what is measured, once a round.
"""

import dataclasses
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.engines import Contestant, row_name
from bench.machine import provenance, read_bandwidth
from bench.workers import Worker, spread
from export.artifact import Artifact, Tensors, read_artifact, to_hf_name, write_artifact
from export.generate import set_threads
from export.model import EMBEDDINGS, float_model, layer_shapes, norm_names
from export.quantization import HEAD, Quantization, linear_layers
from export.quantize.calibration import collect_inputs, plan_input
from export.quantize.rounding import rounded_tensors
from jaxgpt.config import ModelConfig, find_preset
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.tokenizer import Tokenizer

PROMPT_TOKENS = 16
WARMUP_TOKENS = 8
BANDWIDTH_BUFFER_BYTES = 1_000_000_000
RANDOM_VOCAB_SIZE = 50_257
SAME_SIZE = 0.05


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Measure generation speed, batch 1, greedy.

    Attributes:
      artifact: artifact folders.
      run: run folder: its Flax model is measured too.
      preset: measure a model of this shape with random weights, as fp32, int8-dynamic and int8-static.
      tokens: to generate in each round.
      threads: CPU threads; 0 takes all cores that this process may use.
      rounds: in each of which every engine generates once.
      uncached: also without KV cache (slow: every token runs the whole text again).
      peers: also transformers' GPT-2: with its cache, without, and without and with the logits of every
        position (`model(ids).logits[:, -1]`, the original project's way).
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...] = ()
    run: Path | None = None
    preset: str | None = None
    tokens: int = 250
    threads: int = 0
    rounds: int = 3
    uncached: bool = False
    peers: bool = False
    out: Path | None = None
    json: bool = False


def generate(options: GenerateOptions) -> Result:
    """Run `jaxgpt-bench generate`."""
    if options.tokens < 2 or options.rounds < 1:
        raise UserError("--tokens must be at least 2 and --rounds at least 1")
    threads = options.threads or len(os.sched_getaffinity(0))
    set_threads(threads)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        folders = list(options.artifact)
        if options.preset is not None:
            if folders or options.run is not None:
                raise UserError("give --preset, or --artifact and --run, not both")
            folders = random_artifacts(options.preset, Path(scratch))
        artifacts = [read_artifact(folder) for folder in folders]
        if not artifacts:
            raise UserError("nothing to measure: give --artifact ART... or --preset NAME")
        config = artifacts[0].config
        if any(artifact.config != config for artifact in artifacts):
            raise UserError("the artifacts are of different models; measure them one after the other")
        length = min(PROMPT_TOKENS, config.block_size - options.tokens + 1)
        if length < 1:
            raise UserError(
                f"--tokens {options.tokens} does not fit the model's context of {config.block_size}"
            )
        sizes = {artifact.kind: weight_bytes(artifact) for artifact in artifacts}
        files = {artifact.kind: artifact.file_bytes for artifact in artifacts}
        line_up = contestants(options, artifacts, threads)
        del artifacts
        prompt = np.random.default_rng(0).integers(config.vocab_size - 1, size=length).tolist()
        rounds, bandwidths = run_rounds(line_up, prompt, options, sizes, threads)
        rows = [
            row(contestant, rounds[contestant.name], bandwidths, sizes, files, length)
            for contestant in line_up
        ]
    figures = {
        **provenance(),
        "settings": {
            "preset": options.preset,
            "model": dataclasses.asdict(config),
            "tokens": options.tokens,
            "prompt_tokens": length,
            "threads": threads,
            "batch": 1,
            "sampling": "greedy",
        },
        "rounds": options.rounds,
        "bandwidth_gb_s": [round(value, 2) for value in bandwidths["memory"]],
        "rows": rows,
    }
    stderr.print(speed_table(rows))
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures)


def contestants(options: GenerateOptions, artifacts: Sequence[Artifact], threads: int) -> list[Contestant]:
    """List what is measured."""
    found = []
    for artifact in artifacts:
        cached = Contestant("jaxgpt-torch", artifact.kind, str(artifact.folder), threads)
        found.append(cached)
        if options.uncached:
            found.append(dataclasses.replace(cached, cached=False))
        if options.peers and artifact.quantization is None:
            peer = dataclasses.replace(cached, engine="transformers")
            uncached = dataclasses.replace(peer, cached=False)
            found += [peer, uncached, dataclasses.replace(uncached, every_logit=True)]
    if options.run is not None:
        found.append(Contestant("jaxgpt-flax", "fp32", str(options.run), threads))
    return found


def run_rounds(
    line_up: Sequence[Contestant],
    prompt: list[int],
    options: GenerateOptions,
    sizes: dict[str, int],
    threads: int,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    """Generate in every round with every engine.

    Returns:
      The answers by row name, and the read bandwidth of each round by precision, and for "memory"
      (a buffer that no cache holds), in 10^9 bytes a second.
    """
    workers: list[Worker] = []
    answers: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in line_up}
    bandwidths: dict[str, list[float]] = {key: [] for key in ("memory", *sizes)}
    try:
        for contestant in line_up:
            say(f"loading {contestant.name}")
            environment = {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
            order = dataclasses.asdict(contestant)
            workers.append(Worker(contestant.name, "bench.engines", order, environment))
            workers[-1].ask({"prompt": prompt, "count": min(WARMUP_TOKENS, options.tokens)})
        for number in range(options.rounds):
            bandwidths["memory"].append(read_bandwidth(BANDWIDTH_BUFFER_BYTES, threads))
            for kind, size in sizes.items():
                bandwidths[kind].append(read_bandwidth(size, threads))
            for worker in workers:
                answer = worker.ask({"prompt": prompt, "count": options.tokens})
                answers[worker.name].append(answer)
                rate = (options.tokens - 1) / answer["decode_s"]
                say(f"round {number + 1}/{options.rounds}  {worker.name}: {rate:.1f} tokens/s")
    finally:
        for worker in workers:
            worker.close()
    return answers, bandwidths


def row(
    contestant: Contestant,
    answers: Sequence[dict[str, Any]],
    bandwidths: dict[str, list[float]],
    sizes: dict[str, int],
    files: dict[str, int],
    prompt_length: int,
) -> dict[str, Any]:
    """Turn an engine's answers into its row."""
    size = sizes[contestant.precision if contestant.precision in sizes else "fp32"]
    # Artifacts of nearly the same size read at the same rate: their measurements are taken together.
    rates = [
        rate
        for kind, other in sizes.items()
        if abs(other - size) <= SAME_SIZE * size
        for rate in bandwidths[kind]
    ]
    decode = spread([(len(answer["tokens"]) - 1) / answer["decode_s"] for answer in answers])
    ceiling = statistics.median(rates) * 1e9 / size
    return {
        "engine": contestant.engine,
        "precision": contestant.precision,
        "cached": contestant.cached,
        "every_logit": contestant.every_logit,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": spread([prompt_length / answer["prefill_s"] for answer in answers]),
        "seconds": spread([answer["prefill_s"] + answer["decode_s"] for answer in answers]),
        "bytes_per_token": size,
        "read_gb_s": statistics.median(rates),
        "ceiling_tokens_per_s": ceiling,
        "ceiling_share": decode["median"] / ceiling,
        "file_mb": files[contestant.precision] / 1e6,
        "peak_rss_mb": max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        "greedy_tokens": answers[0]["tokens"],
    }


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of weights that one token reads: everything but the embedding rows it skips.

    The token embedding counts once, as the head, where it is that. The PyTorch module holds the weights of
    weight-only artifacts in float32.
    """
    skipped = {"wpe"} if artifact.config.tied else {"wpe", "wte"}
    layers = layer_shapes(artifact.config)
    total = 0
    for name, tensor in artifact.tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in skipped or name == "wte.smooth":
            continue
        expanded = artifact.quantization is not None and artifact.quantization.weight_only and layer in layers
        if expanded and part.startswith("weight"):
            total += 4 * math.prod(layers[layer]) if part != "weight_scale" else 0
        else:
            total += tensor.nbytes
    return total


def random_artifacts(preset: str, scratch: Path) -> list[Path]:
    """Write artifacts of a preset's shape with random weights: fp32, int8-dynamic, int8-static.

    They have no certificate: nothing but their speed means anything.
    """
    config = find_preset(preset).model(RANDOM_VOCAB_SIZE)
    say(f"making random weights of the shape of {preset}")
    tensors = random_tensors(config)
    tokenizer = placeholder_tokenizer(config.vocab_size)
    hf = {}
    for name, tensor in tensors.items():
        conv1d = tensor.ndim == 2 and not name.startswith((*EMBEDDINGS, HEAD))
        hf[to_hf_name(name)] = tensor.t() if conv1d else tensor
    model = float_model(config, tensors)
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    plans = {
        name: plan_input(seen, tensors[f"{linear_layers(config)[name]}.weight"], (1.0,), ())
        for name, seen in collect_inputs(model, tokens.int()).items()
    }
    del model
    bits = dict.fromkeys(layer_shapes(config), 8)
    made: list[tuple[str, Quantization | None, Tensors]] = [
        ("fp32", None, hf),
        ("int8-dynamic", Quantization("dynamic", bits), rounded_tensors(config, tensors, bits)),
        ("int8-static", Quantization("static", bits), rounded_tensors(config, tensors, bits, plans)),
    ]
    for name, quantization, content in made:
        (scratch / name).mkdir()
        write_artifact(scratch / name, config, quantization, content, tokenizer)
    return [scratch / name for name, _, _ in made]


def random_tensors(config: ModelConfig) -> Tensors:
    """Return float tensors by module name, N(0, 0.02), every one non-zero."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for name, (O, I) in layer_shapes(config).items():
        tensors[f"{name}.weight"] = torch.randn(O, I, generator=generator) * 0.02
        if name not in (*EMBEDDINGS, HEAD):
            tensors[f"{name}.bias"] = torch.randn(O, generator=generator) * 0.02
    for name in norm_names(config):
        tensors[f"{name}.weight"] = 1 + torch.randn(config.n_embd, generator=generator) * 0.02
        tensors[f"{name}.bias"] = torch.randn(config.n_embd, generator=generator) * 0.02
    return tensors


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of that size whose merges mean nothing (pairs of bytes, of pairs, ...)."""
    tokens = [bytes([b]) for b in range(256)]
    merges: list[tuple[bytes, bytes]] = []
    for first in tokens:
        for second in tokens:
            if len(merges) == vocab_size - 257:
                return Tokenizer(merges, "placeholder")
            merges.append((first, second))
    raise UserError(f"no placeholder tokenizer has {vocab_size} tokens")


def speed_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out for a terminal."""
    table = Table("engine", "s", "tokens/s", "min-max", "of ceiling", "file MB", "peak MB")
    for line in rows:
        decode = line["decode_tokens_per_s"]
        table.add_row(
            row_name(line),
            f"{line['seconds']['median']:.2f}",
            f"{decode['median']:.1f}",
            f"{decode['min']:.0f}-{decode['max']:.0f}",
            f"{line['ceiling_share']:.0%}",
            f"{line['file_mb']:.1f}",
            f"{line['peak_rss_mb']:.0f}",
        )
    return table
