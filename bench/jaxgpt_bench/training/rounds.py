"""Rounds of `jaxgpt-bench train`: every trainer takes its steps in turn, beside a plain matrix product."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import torch

from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.config import ModelConfig, Precision, TrainConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.devices.precision import best_precision, peak_flops
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import PyTorchComparison, Spread, StepFigures, StepRow
from jaxgpt_bench.common.workers import Worker
from jaxgpt_bench.training.options import TrainingOptions
from jaxgpt_bench.training.trainer import Trainer, environment, weights_file

WARMUP_STEPS = 3
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}  # rows and columns of the product that measures the ceiling
PRODUCT_PASSES = 5


Answer = dict[str, Any]  # of a trainer's process


def measure_steps(options: TrainingOptions) -> StepFigures:
    """Measure every trainer on the same steps.

    Raises:
      UserError: the batch does not divide over the devices, or there are fewer of them.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for the workers
    model, train = settings_of(options)
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    check_devices(options, train, platform)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        trainers = line_up(options, model, train, platform, weights_file(model, Path(scratch)))
        answers, products = run_rounds(trainers, options, train.precision, platform)
    device, product = jax.devices()[0].device_kind, statistics.median(products)
    peak = peak_flops(device, train.precision)
    theirs = None if options.alone else trainers[-1]
    rows = []
    for each in trainers:
        row = step_row(each, answers[each.name], options.steps, product, peak)
        if theirs is not None and each is not theirs and each.tokens_per_step == theirs.tokens_per_step:
            row = dataclasses.replace(
                row, against_pytorch=comparison(answers[each.name], answers[theirs.name])
            )
        rows.append(row)
    return StepFigures(
        **vars(provenance()),
        settings={
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
        device=device,
        flops_per_token=flops_per_token(model),
        product_tflops=Spread.of([value / 1e12 for value in products]),
        datasheet_tflops=None if peak is None else peak / 1e12,
        rows=tuple(rows),
    )


def settings_of(options: TrainingOptions) -> tuple[ModelConfig, TrainConfig]:
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


def check_devices(options: TrainingOptions, train: TrainConfig, platform: str) -> None:
    """Raise UserError for devices that are not there, or over which a batch does not divide."""
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


def line_up(
    options: TrainingOptions, model: ModelConfig, train: TrainConfig, platform: str, weights: Path
) -> list[Trainer]:
    """List who is measured: this trainer on every number of devices, then PyTorch on one."""
    wanted = [("jaxgpt", devices) for devices in options.devices]
    if not options.alone:
        wanted.append(("pytorch", 1))
    trainers = []
    for engine, devices in wanted:
        batch = train.batch_size * (devices if platform == "gpu" else 1)
        scaled = dataclasses.replace(train, batch_size=batch)
        trainers.append(Trainer(engine, devices, platform, model, scaled, str(weights)))
    return trainers


def run_rounds(
    trainers: Sequence[Trainer], options: TrainingOptions, precision: Precision, platform: str
) -> tuple[dict[str, list[Answer]], list[float]]:
    """Let everyone take its steps in every round.

    Returns:
      The answers by row name, the warm-up's first, and the measured FLOP/s of a plain matrix product in each
      round.
    """
    threads = len(os.sched_getaffinity(0))
    workers: list[Worker] = []
    answers: dict[str, list[Answer]] = {each.name: [] for each in trainers}
    products = []
    try:
        for each in trainers:
            say(f"compiling {each.name}")
            worker = Worker(each.name, each.module, dataclasses.asdict(each), environment(each, threads))
            workers.append(worker)
            answers[each.name].append(worker.ask({"steps": WARMUP_STEPS}))
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


def step_row(
    trainer: Trainer, answers: Sequence[Answer], steps: int, product: float, peak: float | None
) -> StepRow:
    """Turn a trainer's answers into its row.

    Args:
      trainer: whose row it is.
      answers: the warm-up's, then one a round.
      steps: of a round.
      product: FLOP/s of a plain matrix product.
      peak: FLOP/s of the datasheet, where that is known.
    """
    timed, tokens = answers[1:], trainer.tokens_per_step
    rates = Spread.of([tokens * steps / answer["seconds"] for answer in timed])
    places = trainer.devices if trainer.platform == "gpu" else 1  # a CPU's devices share its cores
    achieved = rates.median * flops_per_token(trainer.model) / places
    device_bytes = answers[-1]["device_bytes"]
    return StepRow(
        engine=trainer.engine,
        devices=trainer.devices,
        tokens_per_step=tokens,
        step_ms=Spread.of([answer["seconds"] / steps * 1e3 for answer in timed]),
        step_cpu_ms=Spread.of([answer["cpu_seconds"] / steps * 1e3 for answer in timed]),
        tokens_per_s=rates,
        cpu_ms_per_1000_tokens=statistics.median(
            answer["cpu_seconds"] / steps / tokens * 1e6 for answer in timed
        ),
        product_share=achieved / product,
        mfu=None if peak is None else achieved / peak,
        peak_rss_mb=max(answer["peak_rss_bytes"] for answer in answers) / 1e6,
        device_mb=None if device_bytes is None else device_bytes / 1e6,
        losses=tuple(loss for answer in answers for loss in answer["losses"]),
    )


def comparison(ours: Sequence[Answer], theirs: Sequence[Answer]) -> PyTorchComparison:
    """Compare round by round; the first answers are the warm-up's."""
    pairs = list(zip(ours, theirs, strict=True))
    losses = [
        [abs(a - b) for a, b in zip(our["losses"], their["losses"], strict=True)] for our, their in pairs
    ]
    return PyTorchComparison(
        step_time_ratio=Spread.of([our["seconds"] / their["seconds"] for our, their in pairs[1:]]),
        cpu_time_ratio=Spread.of([our["cpu_seconds"] / their["cpu_seconds"] for our, their in pairs[1:]]),
        first_losses_differ_by=max(losses[0]),
        losses_differ_by=max(max(each) for each in losses),
    )
