"""What `jaxgpt-bench train` may be told."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from jaxgpt.shared.config import Precision, TrainConfig
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.options import GPT2_VOCAB_SIZE, ModelSettings, TrainSettings

NEVER = 10**6  # steps: a measurement ends before


@dataclasses.dataclass(frozen=True)
class _MeasuredSettings(TrainSettings):
    """A constant rate and no validation: settings that change how a run goes, but not what a step does."""

    max_steps: tyro.conf.Suppress[int] = NEVER
    final_lr_fraction: tyro.conf.Suppress[float] = 1.0
    warmup_steps: tyro.conf.Suppress[int] = 0
    lr_schedule: tyro.conf.Suppress[Literal["cosine", "linear"]] = "cosine"
    decay_fraction: tyro.conf.Suppress[float] = 1.0
    max_skipped: tyro.conf.Suppress[int] = 20
    seed: tyro.conf.Suppress[int] = 0
    eval_every: tyro.conf.Suppress[int] = NEVER
    eval_tokens: tyro.conf.Suppress[int] = 0
    checkpoint_every: tyro.conf.Suppress[int] = NEVER
    sample_every: tyro.conf.Suppress[int] = 0
    precision: Annotated[
        Precision, tyro.conf.arg(help_behavior_hint="(default: what the device is best at)")
    ] = "fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Measure training steps beside PyTorch's.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      devices: numbers of devices that this trainer is measured with. PyTorch takes one GPU, or all cores. The
        devices of a CPU share the batch, as they share the cores; each GPU takes a batch of its own.
      variant: settings that are measured as well, in the same rounds: any of those below, such as
        remat=true,loss_chunks=16; flash=false for XLA's attention, xla_flags=--A=1 for what is given to XLA.
        The option can be repeated.
      pytorch: how PyTorch is measured: plain, tuned (cuDNN's attention, the loss from logits as they are),
        max-autotune (minutes of compiling); if not given, plain and tuned.
      alone: leave PyTorch out.
      rounds: in each of which every trainer takes its turn.
      steps: of a turn.
      profile: show where a step's time goes: kernels by kind, and the longest ones; on a GPU PyTorch's too.
      accept_noise: take the figures for tables however busy the machine is; the JSON file says so.
      out: also write the figures into this JSON file, after each round.
      json: print one JSON document with all figures on stdout.
      model: the shape of the model.
      training: how it is trained; the batch is that of a micro-batch, if nothing else is given.
      given: names of the settings that were given; the others are the preset's.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--accumulate": "--grad-accum-steps"}

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    devices: tuple[int, ...] = (1,)
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    pytorch: tuple[str, ...] = ()
    alone: tyro.conf.FlagCreatePairsOff[bool] = False
    rounds: int = 5
    steps: int = 10
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    accept_noise: tyro.conf.FlagCreatePairsOff[bool] = False
    out: Path | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    model: ModelSettings
    training: _MeasuredSettings
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()

    @classmethod
    def of_preset(cls, name: str) -> Callable[..., "TrainingOptions"]:
        """Return the constructor with the settings of a preset as its defaults.

        All trainers follow a constant rate, TrainConfig's own, so that their losses can be compared.
        """
        preset, default = find_preset(name), TrainConfig()
        kept = {field.name for field in dataclasses.fields(_MeasuredSettings)} - _constant()
        settings = {
            field: value for field, value in dataclasses.asdict(preset.train).items() if field in kept
        }
        settings |= {
            "batch_size": preset.train.batch_size // preset.train.grad_accum_steps,
            "grad_accum_steps": 1,
            "learning_rate": default.learning_rate,
            "embedding_learning_rate": default.embedding_learning_rate,
        }
        return functools.partial(
            cls,
            model=ModelSettings(**dataclasses.asdict(preset.model(GPT2_VOCAB_SIZE))),
            training=_MeasuredSettings(**settings),
        )


def _constant() -> set[str]:
    """Return the settings that no option changes."""
    return {name for name in _MeasuredSettings.__annotations__ if name != "precision"}
