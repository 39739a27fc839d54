"""`jaxgpt-bench train`: the time of a training step, beside PyTorch's and beside the peak of the device.

    jaxgpt-bench train tiny --vocab-size 50257
    jaxgpt-bench train gpt2 --precision bf16 --batch-size 32 --grad-accum-steps 1     (on a GPU)

This trainer and transformers' GPT-2 (torch.compile, SDPA, fused AdamW) take the same steps on the same
batches from the same weights, each in a process of its own, in turns. On a shared CPU the cpu-seconds of a
step say more than its seconds. The ceiling is the rate of a plain matrix product, measured in the same
rounds; MFU is of the datasheet's peak, where there is one.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import torch
import tyro
from rich.table import Table

from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.config import ModelConfig, Precision, TrainConfig
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.devices.precision import best_precision, peak_flops
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.workers import Worker, spread
from jaxgpt_bench.training.trainers import Contestant, environment, weights_file

WARMUP_STEPS = 3
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}  # rows and columns of the product that measures the ceiling
PRODUCT_PASSES = 5


@dataclasses.dataclass(frozen=True)
class TrainBenchOptions:
    """Measure training steps beside PyTorch's.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      vocab_size: number of tokens.
      batch_size: sequences a step; the preset's if not given. On GPUs of each device; the devices of a CPU
        share it, as they share the cores.
      block_size: context, tokens; the preset's if not given.
      grad_accum_steps: micro-batches of a step.
      precision: of matrix products; if not given, what the device is best at.
      loss_chunks: pieces in which this trainer computes logits.
      vocab_multiple: this trainer pads the token table to a multiple.
      devices: numbers of devices that this trainer is measured with. PyTorch takes one GPU, or all cores.
      rounds: in each of which every trainer takes its turn.
      steps: of a turn.
      alone: leave PyTorch out.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--accumulate": "--grad-accum-steps"}

    preset: tyro.conf.Positional[str]
    vocab_size: int = 50_257
    batch_size: int | None = None
    block_size: int | None = None
    grad_accum_steps: int = 1
    precision: Precision | None = None
    loss_chunks: int = 1
    vocab_multiple: int = 1
    devices: tuple[int, ...] = (1,)
    rounds: int = 5
    steps: int = 10
    alone: bool = False
    out: Path | None = None
    json: bool = False


def settings_of(options: TrainBenchOptions) -> tuple[ModelConfig, TrainConfig]:
    """Return what is trained, and how on one device."""
    preset = find_preset(options.preset)
    model = preset.model(options.vocab_size)
    if options.block_size is not None:
        model = dataclasses.replace(model, block_size=options.block_size)
    train = TrainConfig(
        max_steps=10**6,
        batch_size=preset.train.batch_size if options.batch_size is None else options.batch_size,
        grad_accum_steps=options.grad_accum_steps,
        warmup_steps=0,
        final_lr_fraction=1.0,
        precision=options.precision or best_precision(),
        loss_chunks=options.loss_chunks,
        vocab_multiple=options.vocab_multiple,
    )
    return model, train


def train_bench(options: TrainBenchOptions) -> Result:
    """Run `jaxgpt-bench train`."""
    if options.rounds < 1 or options.steps < 1 or not options.devices or min(options.devices) < 1:
        raise UserError("--rounds, --steps and --devices must be at least 1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for the workers
    model, train = settings_of(options)
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    if platform == "gpu" and max(options.devices) > jax.device_count():
        raise UserError(f"--devices {max(options.devices)}: there are {jax.device_count()} GPUs")
    micro = train.batch_size // train.grad_accum_steps
    if platform == "cpu" and any(micro % devices for devices in options.devices):
        raise UserError(
            f"a micro-batch of {micro} sequences (batch_size / grad_accum_steps) does not divide over "
            f"{max(options.devices)} devices; choose another --batch-size or --devices"
        )
    if platform == "gpu" and not options.alone and not torch.cuda.is_available():
        raise UserError("JAX sees a GPU, PyTorch does not: install its CUDA build, or give --alone")
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        weights = str(weights_file(model, Path(scratch)))

        def contestant(engine: str, devices: int) -> Contestant:
            batch = train.batch_size * (devices if platform == "gpu" else 1)
            scaled = dataclasses.replace(train, batch_size=batch)
            given = (dataclasses.asdict(model), dataclasses.asdict(scaled), weights)
            return Contestant(engine, devices, platform, *given)

        line_up = [contestant("jaxgpt", devices) for devices in options.devices]
        if not options.alone:
            line_up.append(contestant("pytorch", 1))
        answers, products = run_rounds(line_up, options, train.precision, platform)
    product = statistics.median(products)
    rows = [row(each, answers[each.name], options, model, product) for each in line_up]
    device = jax.devices()[0].device_kind
    peak = peak_flops(device, train.precision)
    figures: dict[str, Any] = {
        **provenance(),
        "settings": {
            "preset": options.preset,
            "model": dataclasses.asdict(model),
            "batch_size": train.batch_size,
            "batch_size_is": "of each device" if platform == "gpu" else "of all devices",
            "accumulate": train.grad_accum_steps,
            "precision": train.precision,
            "loss_chunks": train.loss_chunks,
            "vocab_multiple": train.vocab_multiple,
            "optimizer": "adamw",
            "rounds": options.rounds,
            "steps_per_round": options.steps,
        },
        "device": device,
        "flops_per_token": flops_per_token(model),
        "product_tflops": spread([value / 1e12 for value in products]),
        "datasheet_tflops": None if peak is None else peak / 1e12,
        "rows": rows,
    }
    if not options.alone:
        theirs = answers[line_up[-1].name]
        for each, line in zip(line_up[:-1], rows[:-1], strict=True):
            if line["tokens_per_step"] == rows[-1]["tokens_per_step"]:
                line["against_pytorch"] = comparison(answers[each.name], theirs)
    stderr.print(step_table(rows))
    show(figures)
    if options.out is not None:
        write_json(options.out, figures)
    return Result(figures)


def run_rounds(
    line_up: Sequence[Contestant], options: TrainBenchOptions, precision: Precision, platform: str
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Let everyone take its steps in every round.

    Returns:
      The answers by row name, and the measured FLOP/s of a plain matrix product in each round.
    """
    threads = len(os.sched_getaffinity(0))
    workers: list[Worker] = []
    answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in line_up}
    products = []
    try:
        for each in line_up:
            say(f"compiling {each.name}")
            order = dataclasses.asdict(each)
            workers.append(
                Worker(each.name, "jaxgpt_bench.training.trainers", order, environment(each, threads))
            )
            first = workers[-1].ask({"steps": WARMUP_STEPS})
            answers[each.name].append(first)
        for number in range(options.rounds):
            products.append(product_rate(precision, platform))
            for worker in workers:
                answer = worker.ask({"steps": options.steps})
                answers[worker.name].append(answer)
                milliseconds = answer["seconds"] / options.steps * 1e3
                say(f"round {number + 1}/{options.rounds}  {worker.name}: {milliseconds:.1f} ms a step")
    finally:
        for worker in workers:
            worker.close()
    return answers, products


def product_rate(precision: Precision, platform: str) -> float:
    """Measure the best FLOP/s of several square matrix products, by PyTorch on its default threads."""
    device = "cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = PRODUCT_SIZE["gpu" if device == "cuda" else "cpu"]
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(PRODUCT_PASSES):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def row(
    contestant: Contestant,
    answers: Sequence[dict[str, Any]],
    options: TrainBenchOptions,
    model: ModelConfig,
    product: float,
) -> dict[str, Any]:
    """Turn a trainer's answers into its row; the first answer is the warm-up."""
    timed = answers[1:]
    tokens = contestant.train["batch_size"] * model.block_size
    rates = spread([tokens * options.steps / answer["seconds"] for answer in timed])
    peak = peak_flops(jax.devices()[0].device_kind, contestant.train["precision"])
    places = contestant.devices if contestant.platform == "gpu" else 1  # a CPU's devices share its cores
    achieved = rates["median"] * flops_per_token(model) / places
    return {
        "engine": contestant.engine,
        "devices": contestant.devices,
        "tokens_per_step": tokens,
        "step_ms": spread([answer["seconds"] / options.steps * 1e3 for answer in timed]),
        "step_cpu_ms": spread([answer["cpu_seconds"] / options.steps * 1e3 for answer in timed]),
        "tokens_per_s": rates,
        "cpu_ms_per_1000_tokens": statistics.median(
            answer["cpu_seconds"] / options.steps / tokens * 1e6 for answer in timed
        ),
        "product_share": achieved / product,
        "mfu": None if peak is None else achieved / peak,
        "peak_rss_mb": max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        "device_mb": None if answers[-1]["device_bytes"] is None else answers[-1]["device_bytes"] / 1e6,
        "losses": [loss for answer in answers for loss in answer["losses"]],
    }


def comparison(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare round by round, so that a slow moment of the machine falls on both.

    Returns:
      step time and cpu time as ratios (ours / theirs; median, min, max over rounds), and the largest
      difference between the losses of the warm-up steps and of all steps.
    """
    pairs = list(zip(ours, theirs, strict=True))
    losses = [
        [abs(a - b) for a, b in zip(our["losses"], their["losses"], strict=True)] for our, their in pairs
    ]
    return {
        "step_time_ratio": spread([our["seconds"] / their["seconds"] for our, their in pairs[1:]]),
        "cpu_time_ratio": spread([our["cpu_seconds"] / their["cpu_seconds"] for our, their in pairs[1:]]),
        "first_losses_differ_by": max(losses[0]),
        "losses_differ_by": max(max(each) for each in losses),
    }


def step_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out for a terminal."""
    table = Table("trainer", "ms/step", "cpu-ms/step", "tokens/s", "of a product's rate", "MFU", "peak MB")
    for line in rows:
        table.add_row(
            f"{line['engine']} x{line['devices']}",
            f"{line['step_ms']['median']:.1f} ({line['step_ms']['min']:.1f}-{line['step_ms']['max']:.1f})",
            f"{line['step_cpu_ms']['median']:.1f}",
            f"{line['tokens_per_s']['median']:,.0f}",
            f"{line['product_share']:.0%}",
            "unknown" if line["mfu"] is None else f"{line['mfu']:.1%}",
            f"{line['device_mb'] or line['peak_rss_mb']:.0f}",
        )
    return table


def show(figures: dict[str, Any]) -> None:
    """Say what the ratios and rates rest on."""
    peak = figures["datasheet_tflops"]
    known = f"{peak:g} TFLOP/s" if peak else "not known, so no MFU"
    say(
        f"{figures['flops_per_token']:.3g} FLOPs a token; a plain product reaches "
        f"{figures['product_tflops']['median']:.3g} TFLOP/s; datasheet of {figures['device']}: {known}"
    )
    for line in figures["rows"]:
        if "against_pytorch" not in line:
            continue
        found = line["against_pytorch"]
        step, cpu = found["step_time_ratio"], found["cpu_time_ratio"]
        say(
            f"{line['engine']} x{line['devices']} against PyTorch: "
            f"{step['median']:.2f} ({step['min']:.2f}-{step['max']:.2f}) of its step time, "
            f"{cpu['median']:.2f} ({cpu['min']:.2f}-{cpu['max']:.2f}) of its cpu time; "
            f"losses apart by {found['first_losses_differ_by']:.1e} at first"
        )
