"""OUT/plan.json: what a preset becomes on this device, in the minutes that there are. Made once, then kept.

The steps of the training are chosen before it, from the measured time of a step. How much is measured is
chosen after the last quantization, from the time that is left then.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError, damaged
from jaxgpt.shared.files import read_json, write_json
from jaxgpt_bench.reproduce.minutes.clock import Clock, clock_text
from jaxgpt_bench.reproduce.minutes.costs import STAGES, Amounts, Experiment
from jaxgpt_bench.reproduce.minutes.probe import Attempt, CpuSpeed, Probe
from jaxgpt_bench.reproduce.minutes.schedule import (
    LEAST_STEPS,
    TooShortError,
    length_of,
    settings_of,
    validation_s,
)
from jaxgpt_bench.reproduce.recipes import Recipe

PLAN = "plan.json"
MEASURED = STAGES[2:]  # what `Amounts` are of
OTHERS_SHARE = 0.33  # of the minutes, at most, for all stages after the training
SAFETY = 1.15  # times what they are estimated to cost
QAT_SHARE = 0.07  # of the minutes, for the quantization-aware training
QAT_FACTOR = 2.5  # times a step's time a token: an estimate, to choose the steps that are then measured
LEAST_QAT_STEPS = 10
PROFILE_S = 90.0  # of a step's kernels, on a GPU
CALL_S = 15.0  # of each call: imports, hashes
AGAIN = 0.6  # of a training's start, when what it compiles is kept from the first one
SAVING_BYTES_S = 1e8  # of a checkpoint, on a slow disk
SAVING_S = 10.0
SHAPE = {field.name for field in dataclasses.fields(ModelConfig)} - {"dropout", "attn_dropout", "qat"}
USEFUL_S = 20.0  # of steps, for which a training is begun or gone on with
UNPLANNED_SAVING_S = 30.0  # where the size of a checkpoint was not looked at
DRIFT = (0.7, 4.0)  # bounds of what the stages so far took, as a share of what they were estimated to take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen, and what that rests on.

    Attributes:
      preset: of the recipe.
      minutes: of the whole experiment; None where only the device was asked.
      data: hash of the data set's manifest.
      train: settings of the training beside the recipe's.
      qat: of the quantization-aware training.
      attempts: how they were measured on this device.
      cpu: speed of the float32 module on this CPU.
      planned_s: seconds of each stage.
      startup_s: of a training, until its first step.
      saving_s: of a checkpoint, at most.
      length: of the training, in words.
      methods: quantizations.
      amounts: how much is measured; None before that is chosen.
    """

    preset: str
    minutes: float | None
    data: str
    train: dict[str, Any]
    qat: dict[str, Any] | None
    attempts: dict[str, Any]
    cpu: dict[str, Any] | None
    planned_s: dict[str, float]
    startup_s: float
    saving_s: float
    length: str
    methods: int
    amounts: dict[str, int] | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """Return a recipe with what was chosen."""
        qat = None if recipe.qat is None else {**recipe.qat, **(self.qat or {})}
        amounts: dict[str, Any] = dict(self.amounts or {})
        return dataclasses.replace(recipe, train={**recipe.train, **self.train}, qat=qat, **amounts)

    def needs_s(self, stage: str) -> float:
        """Return the seconds that a call must have left to begin a stage, as far as they are known."""
        if stage in ("train", "qat"):  # they can be cut
            return self.startup_s + self.saving_s + USEFUL_S
        times = {"quantize": self.methods, "convert": 1 if self.qat is None else 2}.get(stage, 1)
        return self.planned_s.get(stage, 0.0) / times

    @property
    def platform(self) -> str:
        """Of the device: cpu, gpu."""
        return str(self.attempts["train"]["platform"])

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        write_json(folder / PLAN, dataclasses.asdict(self))


def unplanned_needs_s(stage: str) -> float:
    """Return the seconds that a call must have left to begin a stage, where nothing was planned."""
    return UNPLANNED_SAVING_S + USEFUL_S if stage in ("train", "qat") else 0.0


def read_plan(folder: Path, preset: str, minutes: float | None) -> Plan | None:
    """Return the plan of a folder; None where there is none.

    Raises:
      UserError: it is damaged, or of another preset or other minutes.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    found = read_json(path, "plan")
    with damaged(path, f"remove it (and {folder / 'run'}, which was trained by it)"):
        plan = Plan(**found)
    if (plan.preset, plan.minutes) != (preset, minutes):
        raise UserError(
            f"{path} is of {plan.preset}, {_minutes_text(plan.minutes)}; now {preset}, "
            f"{_minutes_text(minutes)}; give what was given, or choose another --out"
        )
    return plan


def _minutes_text(minutes: float | None) -> str:
    return "without --minutes" if minutes is None else f"--minutes {minutes:g}"


def fitted(recipe: Recipe, preset: str, dataset: Dataset) -> Plan:
    """Return a plan that only fits the device; no time is bounded."""
    with Probe(dataset.folder) as probe:
        train = probe.attempt(dict(recipe.train), fits_device=True)
        say(f"[plan] training: {train.why}; {train.attention}")
        qat = _qat_attempt(probe, recipe, {})
    return Plan(
        preset=preset,
        minutes=None,
        data=dataset.sha256,
        train=train.settings,
        qat=None if qat is None else qat.settings,
        attempts=_attempts(train, qat),
        cpu=None,
        planned_s={},
        startup_s=train.startup_s,
        saving_s=_saving_s(train),
        length="",
        methods=1,
    )


def _qat_attempt(probe: Probe, recipe: Recipe, changed: Mapping[str, Any]) -> Attempt | None:
    if recipe.qat is None:
        return None
    shape = {name: value for name, value in recipe.train.items() if name in SHAPE}  # of what it goes on from
    found = probe.attempt({**shape, **recipe.qat, **changed, "qat": True}, fits_device=recipe.fits_device)
    say(f"[plan] training with rounding: {found.why}")
    return found


def _attempts(train: Attempt, qat: Attempt | None) -> dict[str, Any]:
    return {"train": dataclasses.asdict(train), "qat": qat and dataclasses.asdict(qat)}


def _saving_s(train: Attempt) -> float:
    return SAVING_S + train.state_bytes / SAVING_BYTES_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is made for.

    Attributes:
      preset: name of the recipe.
      minutes: of the whole experiment.
      budget_s: seconds of each call; None for one call.
      methods: quantizations.
      other_tokens: of the texts from elsewhere, about.
    """

    preset: str
    minutes: float
    budget_s: float | None
    methods: int
    other_tokens: int


def planned(asked: Asked, recipe: Recipe, dataset: Dataset, clock: Clock) -> Plan:
    """Measure a step and choose the number of steps.

    Raises:
      UserError: the minutes are too few, or the training fits no device.
    """
    whole_s = asked.minutes * 60
    with Probe(dataset.folder) as probe:
        train = probe.attempt(dict(recipe.train), fits_device=recipe.fits_device)
        say(f"[plan] training: {train.why}; {train.attention}; {train.tokens_per_s:,.0f} tokens/s")
        cpu = probe.cpu_speed(dict(recipe.train))
        rounded = _qat_settings(recipe, train, whole_s)
        qat = _qat_attempt(probe, recipe, rounded)
    others = _others_s(asked, recipe, dataset, cpu, train)
    if qat is not None:
        others["qat"] = _qat_s(qat, rounded["max_steps"], len(dataset.val))
    others["profile"] = PROFILE_S if train.platform == "gpu" else 0.0
    calls = 1 if asked.budget_s is None else math.ceil(whole_s / asked.budget_s)
    begin_s, spent_s = train.startup_s + (calls - 1) * (CALL_S + AGAIN * train.startup_s), clock.spent_s()
    seconds = {"data and plan": spent_s, "train": begin_s, **others}
    try:
        length = length_of(
            whole_s - math.fsum(seconds.values()),
            train.step_s,
            train.batch_size,
            train.block_size,
            len(dataset.train),
            len(dataset.val),
            halves=recipe.fits_device,
            devices=train.devices,
            micro_batch=_micro_batch(train),
        )
    except TooShortError as short:
        raise _too_few(asked.minutes, seconds, short) from None
    seconds["train"] += length.seconds
    say(f"[plan] {length}; {', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}")
    settings = settings_of(length, recipe.train, 1 / train.tokens_per_s, len(dataset.val))
    return Plan(
        preset=asked.preset,
        minutes=asked.minutes,
        data=dataset.sha256,
        train={**train.settings, **_cut(train, length.batch_size), **settings},
        qat=None if qat is None else {**qat.settings, **rounded},
        attempts=_attempts(train, qat),
        cpu=dataclasses.asdict(cpu),
        planned_s={name: round(value, 1) for name, value in seconds.items()},
        startup_s=train.startup_s,
        saving_s=_saving_s(train),
        length=str(length),
        methods=asked.methods,
    )


def _too_few(minutes: float, seconds: Mapping[str, float], short: TooShortError) -> UserError:
    wanted = math.ceil(minutes + (short.needed_s - short.available_s) / 60)
    others = {**seconds, "a training's start": seconds["train"]}
    del others["train"]
    said = ", ".join(f"{name} {value:.0f} s" for name, value in others.items() if value >= 1)
    return UserError(
        f"--minutes {minutes:g} are too few on this machine: beside the training's steps they take {said}, "
        f"and {LEAST_STEPS} steps {short.needed_s:.0f} s; give --minutes {wanted}"
    )


def _others_s(
    asked: Asked, recipe: Recipe, dataset: Dataset, cpu: CpuSpeed, train: Attempt
) -> dict[str, float]:
    """Return the seconds kept for the stages after the training, with the amounts that fit their share."""
    experiment = _experiment(asked, recipe, dataset, cpu, train.block_size)
    amounts = experiment.fitting(recipe, OTHERS_SHARE * asked.minutes * 60 / SAFETY)
    return {name: seconds * SAFETY for name, seconds in experiment.seconds(amounts).items()}


def _experiment(asked: Asked, recipe: Recipe, dataset: Dataset, cpu: CpuSpeed, block_size: int) -> Experiment:
    return Experiment(
        cpu=cpu,
        block_size=block_size,
        train_tokens=len(dataset.train),
        val_tokens=len(dataset.val),
        methods=asked.methods,
        conversions=1 if recipe.qat is None else 2,
        other_tokens=asked.other_tokens,
        answers=recipe.answers,
    )


def _qat_settings(recipe: Recipe, train: Attempt, whole_s: float) -> dict[str, Any]:
    """Return the length of the quantization-aware training, from an estimate of its step's time."""
    if recipe.qat is None:
        return {}
    most = recipe.qat["max_steps"]
    step_s = (
        QAT_FACTOR * recipe.qat.get("batch_size", train.batch_size) * train.block_size / train.tokens_per_s
    )
    steps = max(min(math.floor(QAT_SHARE * whole_s / step_s), most), min(LEAST_QAT_STEPS, most))
    warmup = round(recipe.qat["warmup_steps"] / most * steps)
    return {"max_steps": steps, "warmup_steps": warmup, "eval_every": steps, "checkpoint_every": steps}


def _qat_s(qat: Attempt, steps: int, val_tokens: int) -> float:
    """Return the seconds of it: it measures the loss where it begins and where it ends."""
    return qat.startup_s + steps * qat.step_s + 2 * validation_s(val_tokens, 1 / qat.tokens_per_s)


def _cut(train: Attempt, batch_size: int) -> dict[str, int]:
    """Return how a perhaps smaller batch is cut into micro-batches of the size that was measured."""
    if "grad_accum_steps" not in train.settings:
        return {}
    return {"batch_size": batch_size, "grad_accum_steps": max(batch_size // _micro_batch(train), 1)}


def _micro_batch(train: Attempt) -> int:
    """Return the sequences of a micro-batch that were measured, all devices together."""
    return int(train.batch_size // train.settings.get("grad_accum_steps", 1))


def with_amounts(plan: Plan, asked: Asked, recipe: Recipe, dataset: Dataset, clock: Clock) -> Plan:
    """Choose how much is measured in the time that is left, by what the stages so far took."""
    assert plan.minutes is not None
    assert plan.cpu is not None
    block_size = plan.attempts["train"]["block_size"]
    experiment = _experiment(asked, recipe, dataset, CpuSpeed(**plan.cpu), block_size)
    expected, took = experiment.seconds(Amounts.of(recipe)), clock.stage_seconds()
    done = [name for name in ("convert", "quantize") if took.get(name)]
    drift = (
        math.fsum(took[name] for name in done) / math.fsum(expected[name] for name in done) if done else 1.0
    )
    drift = min(max(drift, DRIFT[0]), DRIFT[1])
    left_s = plan.minutes * 60 - clock.spent_s()
    amounts = experiment.fitting(recipe, left_s / drift, MEASURED)
    seconds = {name: experiment.seconds(amounts)[name] * drift for name in MEASURED}
    say(
        f"[plan] {clock_text(left_s)} are left for {', '.join(MEASURED)}, which take about "
        f"{clock_text(math.fsum(seconds.values()))}: {dataclasses.asdict(amounts)}"
    )
    planned_s = {**plan.planned_s, **{name: round(value, 1) for name, value in seconds.items()}}
    return dataclasses.replace(plan, amounts=dataclasses.asdict(amounts), planned_s=planned_s)
