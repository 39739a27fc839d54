"""Rounds of `jaxgpt-bench train`: every trainer takes its steps in turn, beside a plain matrix product."""

import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import torch

from jaxgpt.shared.architecture import flops_per_token
from jaxgpt.shared.config import Precision
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json
from jaxgpt.shared.machine import usable_cores
from jaxgpt.training.devices.precision import peak_flops
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import Noise, Spread
from jaxgpt_bench.common.step_rows import PyTorchComparison, StepFigures, StepProfile, StepRow
from jaxgpt_bench.noise.meter import NoiseMeter
from jaxgpt_bench.profile.rates import product_rate
from jaxgpt_bench.training.contestants import PYTORCH_OPTIMIZER, all_variants, check, first_settings, line_up
from jaxgpt_bench.training.options import TrainingOptions
from jaxgpt_bench.training.trainer import Trainer, weights_file
from jaxgpt_bench.training.turns import Answer, Turns
from jaxgpt_bench.training.variants import Variant

PRODUCT_SIZE = 2048  # rows and columns of the product that measures a CPU's ceiling
PRODUCT_PASSES = 5
PROFILED_STEPS = 5


@dataclasses.dataclass
class Measured:
    """What was measured so far.

    Attributes:
      answers: of each trainer by its name, the warm-up's first, then one a round.
      profiles: of those that were profiled.
      products: FLOP/s of a plain matrix product, one a round.
    """

    answers: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)
    profiles: dict[str, StepProfile] = dataclasses.field(default_factory=dict)
    products: list[float] = dataclasses.field(default_factory=list)


def measure_steps(options: TrainingOptions) -> StepFigures:
    """Measure every trainer on the same steps; after each round the figures so far are written.

    Raises:
      UserError: a variant that can't be, a batch that does not divide over the devices, too few of them; or
        no step of the first trainer was measured.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for the workers
    first = first_settings(options)
    variants = [first, *all_variants(options, first)]
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    check(options, variants, platform)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        weights = functools.cache(lambda model: weights_file(model, Path(scratch)))
        trainers = line_up(options, variants, platform, weights)
        turns = Turns(usable_cores(), Path(scratch))
        try:
            return _run(options, first, trainers, turns)
        finally:
            turns.close()


def _run(options: TrainingOptions, first: Variant, trainers: Sequence[Trainer], turns: Turns) -> StepFigures:
    measured = Measured()
    for each in trainers:
        say(f"compiling {each.name}")
        if answer := turns.warm_up(each):
            measured.answers[each.name] = [answer]
        elif each is trainers[0]:
            raise UserError(f"{each.name} was not measured: it {turns.left_out[each.name]}")
    figures = None
    meter = NoiseMeter()
    for number in range(options.rounds):
        measured.products.append(plain_product(first.train.precision, trainers[0].platform))
        for each in trainers:
            if each.name in measured.answers and each.name not in turns.left_out:
                _take_turn(each, options, measured, turns, number)
        noise = meter.noise(measured.products, options.accept_noise)
        figures = figures_of(options, first, trainers, measured, turns.left_out, noise)
        if options.out is not None:
            write_json(options.out, figures.to_json())
    assert figures is not None
    return figures


def _take_turn(
    trainer: Trainer, options: TrainingOptions, measured: Measured, turns: Turns, number: int
) -> None:
    """Take the steps of a round; in the first one a profile too, so that a run that is cut short has it."""
    profiled = number == 0 and options.profile and (trainer.engine == "jaxgpt" or trainer.platform == "gpu")
    more = [{"profile": PROFILED_STEPS}] if profiled else []
    found = turns.ask(trainer, {"steps": options.steps}, *more)
    if found is None:
        return
    measured.answers[trainer.name].append(found[0])
    milliseconds = found[0]["seconds"] / options.steps * 1e3
    say(f"round {number + 1}/{options.rounds}  {trainer.name}: {milliseconds:.1f} ms a step")
    for answer in found[1:]:
        if "profile" in answer:
            measured.profiles[trainer.name] = StepProfile.from_json(answer["profile"])
        else:
            say(f"no profile of {trainer.name}: {answer['error_of_profile']}")


def plain_product(precision: Precision, platform: str) -> float:
    """Measure the best FLOP/s of several square products: on a CPU by PyTorch on its default threads."""
    if platform == "gpu":
        return product_rate("tf32" if precision == "fp32" else precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.set_float32_matmul_precision("highest")
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    best = 0.0
    for _ in range(PRODUCT_PASSES):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * PRODUCT_SIZE**3 / (time.perf_counter() - started))
    return best


def figures_of(
    options: TrainingOptions,
    first: Variant,
    trainers: Sequence[Trainer],
    measured: Measured,
    left_out: Mapping[str, str],
    noise: Noise | None = None,
) -> StepFigures:
    """Turn what was measured into rows."""
    answers = {name: each for name, each in measured.answers.items() if len(each) > 1}
    there = [each for each in trainers if each.name in answers]
    if trainers[0].name not in answers:
        raise UserError(f"{trainers[0].name} was not measured: it {left_out[trainers[0].name]}")
    device, product = jax.devices()[0].device_kind, statistics.median(measured.products)
    peak = peak_flops(device, first.train.precision)
    rows = []
    for each in there:
        row = step_row(each, answers[each.name], options.steps, product, peak)
        compared = _fastest_pytorch(each, there, answers) if each.engine == "jaxgpt" else None
        changes: dict[str, Any] = {"profile": measured.profiles.get(each.name)}
        if compared is not None:
            changes["against_pytorch"] = comparison(each, compared, answers)
        if each is not trainers[0]:
            changes["against_first"] = time_ratio(each, trainers[0], answers)
        rows.append(dataclasses.replace(row, **changes))
    return StepFigures(
        **vars(provenance(noise)),
        settings={**_settings(options, first, trainers[0].platform), "rounds": len(measured.products)},
        device=device,
        flops_per_token=flops_per_token(first.model),
        product_tflops=Spread.of([value / 1e12 for value in measured.products]),
        datasheet_tflops=None if peak is None else peak / 1e12,
        left_out=dict(left_out) or None,
        rows=tuple(rows),
    )


def _settings(options: TrainingOptions, first: Variant, platform: str) -> dict[str, Any]:
    return {
        "preset": options.preset,
        "model": dataclasses.asdict(first.model),
        "train": dataclasses.asdict(first.train),
        "batch_size": first.train.batch_size,
        "batch_size_is": "of each device" if platform == "gpu" else "of all devices",
        "accumulate": first.train.grad_accum_steps,
        "precision": first.train.precision,
        "loss_chunks": first.train.loss_chunks,
        "vocab_multiple": first.train.vocab_multiple,
        "optimizer": first.train.optimizer,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
    }


def _fastest_pytorch(
    trainer: Trainer, trainers: Sequence[Trainer], answers: Mapping[str, list[Answer]]
) -> Trainer | None:
    """Return PyTorch's best row, where it takes as many tokens a step; None where there is none."""
    theirs = [
        each
        for each in trainers
        if each.engine == "pytorch" and each.tokens_per_step == trainer.tokens_per_step
    ]

    def median(each: Trainer) -> float:
        return statistics.median(answer["seconds"] for answer in answers[each.name][1:])

    return min(theirs, key=median, default=None)


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
        variant=trainer.variant or None,
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
        startup_s=answers[0]["startup_s"],
        compile_s=answers[0]["compile_s"],
    )


def time_ratio(trainer: Trainer, other: Trainer, answers: Mapping[str, list[Answer]]) -> Spread:
    """Compare the time a token of two trainers, round by round."""
    ours, theirs = answers[trainer.name][1:], answers[other.name][1:]
    tokens = other.tokens_per_step / trainer.tokens_per_step
    pairs = zip(ours, theirs, strict=False)  # one may have stopped earlier
    return Spread.of([tokens * our["seconds"] / their["seconds"] for our, their in pairs])


def comparison(trainer: Trainer, other: Trainer, answers: Mapping[str, list[Answer]]) -> PyTorchComparison:
    """Compare with PyTorch, round by round; the first answers are the warm-up's."""
    pairs = list(zip(answers[trainer.name], answers[other.name], strict=False))
    losses = [
        [abs(a - b) for a, b in zip(our["losses"], their["losses"], strict=True)] for our, their in pairs
    ]
    same = trainer.train.optimizer == PYTORCH_OPTIMIZER
    return PyTorchComparison(
        step_time_ratio=time_ratio(trainer, other, answers),
        cpu_time_ratio=Spread.of([our["cpu_seconds"] / their["cpu_seconds"] for our, their in pairs[1:]]),
        first_losses_differ_by=max(losses[0]) if same else None,
        losses_differ_by=max(max(each) for each in losses) if same else None,
        row=other.name,
    )
