"""`jaxgpt-bench generate`: tokens a second, beside the ceiling that the memory sets.

    jaxgpt-bench generate --artifact ART... --tokens 250
    jaxgpt-bench generate --preset gpt2 --peers            (random weights: speed does not depend on them)

Every engine runs in a process of its own, with the same threads and in huge pages; in each round all of
them generate once, one after the other, so that a slow moment of the machine hits none alone. The ceiling is
measured read bandwidth / bytes of weights a token; reading a buffer of just that size is what is measured,
before and after each round.
"""

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.agreement import agreeing
from bench.engines import row_name
from bench.lineup import Entry, chosen_peers, in_order, own_entries, peer_entries
from bench.machine import provenance, read_bandwidth
from bench.workers import Worker, spread
from export.artifact import Tensors, read_artifact, to_hf_name, write_artifact
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
      prefill: tokens of a prompt that is timed as well in each round; a shorter context bounds it.
      peers: also every other program that is installed, with the same float32 weights: see `bench.peers`.
        transformers' GPT-2 runs with its cache, without, and without and with the logits of every position
        (`model(ids).logits[:, -1]`, the original project's way).
      peer: only these of them, by their engine names.
      out: also write the figures into this JSON file, and a plot beside it (.svg, .png).
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...] = ()
    run: Path | None = None
    preset: str | None = None
    tokens: int = 250
    threads: int = 0
    rounds: int = 3
    uncached: bool = False
    prefill: int = 512
    peers: bool = False
    peer: tuple[str, ...] = ()
    out: Path | None = None
    json: bool = False


def generate(options: GenerateOptions) -> Result:
    """Run `jaxgpt-bench generate`."""
    if options.tokens < 2 or options.rounds < 1 or options.prefill < 1:
        raise UserError("--tokens must be at least 2, --rounds and --prefill at least 1")
    wanted = chosen_peers(options.peers, options.peer)
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
        prefill = min(options.prefill, config.block_size)
        line_up = own_entries(artifacts, options.run, options.uncached, threads)
        left_out: dict[str, str] = {}
        if wanted:
            peers, left_out = peer_entries(artifacts, wanted, Path(scratch), threads)
            line_up = in_order([*line_up, *peers])
        del artifacts
        draw = np.random.default_rng(0)
        prompts = [draw.integers(config.vocab_size - 1, size=size).tolist() for size in (length, prefill)]
        rounds, bandwidths, failed = run_rounds(line_up, prompts, options, threads)
    measured = [entry for entry in line_up if entry.name not in failed]
    reference = next((rounds[e.name][0]["tokens"] for e in measured if e.precision == "fp32"), None)
    rows = [row(entry, rounds[entry.name], bandwidths, prefill, reference) for entry in measured]
    figures = {
        **provenance(),
        "settings": {
            "preset": options.preset,
            "model": dataclasses.asdict(config),
            "tokens": options.tokens,
            "prompt_tokens": length,
            "prefill_tokens": prefill,
            "threads": threads,
            "batch": 1,
            "sampling": "greedy",
        },
        "rounds": options.rounds,
        "bandwidth_gb_s": [round(value, 2) for value in bandwidths[BANDWIDTH_BUFFER_BYTES]],
        "left_out": {**left_out, **failed},
        "rows": rows,
    }
    stderr.print(speed_table(rows))
    if options.out is not None:
        write_json(options.out, figures)
        from bench.plots import write_speed_plots  # matplotlib takes a second

        say(f"wrote {options.out} and {', '.join(map(str, write_speed_plots(figures, options.out)))}")
    return Result(figures)


def run_rounds(
    line_up: Sequence[Entry], prompts: Sequence[list[int]], options: GenerateOptions, threads: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[int, list[float]], dict[str, str]]:
    """Generate in every round with every engine.

    Args:
      line_up: what is measured.
      prompts: the one that is continued, and the one whose prefill is timed.
      options: tokens and rounds.
      threads: CPU threads.

    Returns:
      The answers by row name; the read bandwidth of each round, in 10^9 bytes a second, the better of
      before and after it, by the size of the buffer that was read; and the peers that did not run, with why.
    """
    workers: list[Worker] = []
    failed: dict[str, str] = {}
    environments: dict[str, dict[str, str]] = {}
    answers: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in line_up}
    bandwidths: dict[int, list[float]] = {BANDWIDTH_BUFFER_BYTES: []}
    prompt, long_prompt = prompts
    try:
        for entry in line_up:
            say(f"loading {entry.name}")
            try:
                worker, environments[entry.name] = entry.start(prompt, min(WARMUP_TOKENS, options.tokens))
                workers.append(worker)
                workers[-1].ask({"prompt": long_prompt, "count": 1})
            except (RuntimeError, BrokenPipeError) as error:
                if not entry.is_peer:
                    raise
                failed[entry.name] = str(error)
                workers = [worker for worker in workers if worker.name != entry.name]
                say(f"{entry.name} is left out: {error}")
        sizes = [entry.bytes_per_token for entry in line_up if entry.name not in failed]
        bandwidths |= {size: [] for size in distinct_sizes(sizes)}
        for number in range(options.rounds):
            before = {size: read_bandwidth(size, threads) for size in bandwidths}
            for worker in workers:
                answer = worker.ask({"prompt": prompt, "count": options.tokens})
                prefilled = worker.ask({"prompt": long_prompt, "count": 1})
                more = {"long_prefill_s": prefilled["prefill_s"], "environment": environments[worker.name]}
                answers[worker.name].append({**answer, **more})
                rate = (options.tokens - 1) / answer["decode_s"]
                say(f"round {number + 1}/{options.rounds}  {worker.name}: {rate:.1f} tokens/s")
            for size, rates in bandwidths.items():
                rates.append(max(before[size], read_bandwidth(size, threads)))
    finally:
        for worker in workers:
            worker.close()
    return answers, bandwidths, failed


def distinct_sizes(sizes: Sequence[int]) -> list[int]:
    """Return sizes of which every given one is near one: buffers of nearly the same size read alike."""
    found: list[int] = []
    for size in sorted(sizes):
        if not found or size > (1 + SAME_SIZE) * found[-1]:
            found.append(size)
    return found


def row(
    entry: Entry,
    answers: Sequence[dict[str, Any]],
    bandwidths: dict[int, list[float]],
    prefill: int,
    reference: Sequence[int] | None,
) -> dict[str, Any]:
    """Turn an engine's answers into its row.

    Args:
      entry: what was measured.
      answers: one a round.
      bandwidths: by size of the buffer.
      prefill: tokens of the long prompt.
      reference: the float32 artifact's greedy tokens; None where it was not measured.
    """
    size = entry.bytes_per_token
    nearest = min(bandwidths, key=lambda other: abs(other - size))
    rate = statistics.median(bandwidths[nearest])
    decode = spread([(len(answer["tokens"]) - 1) / answer["decode_s"] for answer in answers])
    ceiling = rate * 1e9 / size
    tokens = answers[0]["tokens"]
    contestant = entry.contestant
    return {
        "engine": contestant.engine,
        "precision": contestant.precision,
        "cached": contestant.cached,
        "every_logit": contestant.every_logit,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": spread([prefill / answer["long_prefill_s"] for answer in answers]),
        "seconds": spread([answer["prefill_s"] + answer["decode_s"] for answer in answers]),
        "bytes_per_token": size,
        "read_gb_s": rate,
        "ceiling_tokens_per_s": ceiling,
        "ceiling_share": decode["median"] / ceiling,
        "file_mb": entry.file_bytes / 1e6,
        "peak_rss_mb": max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        "settings": {**entry.settings, **answers[0]["environment"]},
        "greedy_agrees": None if reference is None else agreeing(reference, tokens),
        "greedy_tokens": tokens,
    }


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
    table = Table(
        "engine", "s", "tokens/s", "min-max", "of ceiling", "prefill/s", "file MB", "peak MB", "same"
    )
    for line in rows:
        decode = line["decode_tokens_per_s"]
        table.add_row(
            row_name(line),
            f"{line['seconds']['median']:.2f}",
            f"{decode['median']:.1f}",
            f"{decode['min']:.0f}-{decode['max']:.0f}",
            f"{line['ceiling_share']:.0%}",
            f"{line['prefill_tokens_per_s']['median']:.0f}",
            f"{line['file_mb']:.1f}",
            f"{line['peak_rss_mb']:.0f}",
            "" if line["greedy_agrees"] is None else str(line["greedy_agrees"]),
        )
    return table
