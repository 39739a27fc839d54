"""What `jaxgpt train` may be told, and the configuration that follows from it; imports no JAX at its head.

The settings are the fields of ModelConfig and TrainConfig, documented there; their values are a preset's,
where nothing else is given. From Python: `train_options("tiny", data=DATA, out=RUN, n_layer=3)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from jaxgpt.shared.config import ModelConfig, Precision, TrainConfig
from jaxgpt.shared.errors import UserError, nearest
from jaxgpt.shared.presets import PRESETS, find_preset
from jaxgpt.training.optimizers import check_optimizer

if TYPE_CHECKING:
    from jaxgpt.shared.dataset import Dataset
    from jaxgpt.training.run.folder import RunConfig
    from jaxgpt.training.run.init_from import InitSource

GPT2_VOCAB_SIZE = 50_257
BESIDE = ("init", "override", "compilation_cache", "json")  # options that may be left out and are no settings


@dataclasses.dataclass(frozen=True)
class ModelSettings(ModelConfig):
    """A ModelConfig that may still change: with the data, and with the model of --init."""

    def __post_init__(self) -> None:
        """Check nothing: model_config does."""


@dataclasses.dataclass(frozen=True)
class TrainSettings(TrainConfig):
    """A TrainConfig as the command line gives it."""

    def __post_init__(self) -> None:
        """Check nothing: train_config does, and no frame of tyro's is around its messages."""


@dataclasses.dataclass(frozen=True)
class _ModelOfData(ModelSettings):
    vocab_size: tyro.conf.Suppress[int]  # the data's


@dataclasses.dataclass(frozen=True)
class _SettingsOfDevice(TrainSettings):
    precision: Annotated[
        Precision, tyro.conf.arg(help_behavior_hint="(default: what the device is best at)")
    ] = "fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Which devices train, and how several processes find each other.

    Attributes:
      cpu_devices: simulate so many devices on the CPU (in each process); 0 takes the devices that JAX finds.
      mesh: layout of the devices, such as data=4,fsdp=2; all on data if not given.
      distributed: one of several processes that JAX finds by itself (Slurm, Kubernetes, Open MPI).
      coordinator: host:port of process 0, where JAX can't find it.
      process_count: number of processes, with coordinator.
      process_index: which one this is, with coordinator.
      join_timeout: seconds to wait for the other processes.
    """

    cpu_devices: int = 0
    mesh: str = ""
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    join_timeout: int = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a GPT-2; running the same command again resumes.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      data: dataset folder of `jaxgpt prepare`; the vocabulary comes from it.
      out: the run folder.
      init: begin with the model of this folder: a run (its best checkpoint), or a float32 artifact, which is
        a Hugging Face GPT-2 folder; the shape comes from it, the training settings don't.
      compilation_cache: folder in which compiled programs are kept for the next start; none keeps nothing,
        auto takes JAX_COMPILATION_CACHE_DIR, else the user's cache folder; several processes on GPUs
        take neither, others not the latter.
      override: change the run in --out, from its last checkpoint on: to what is given here; what is not given
        stays as it was.
      json: print one JSON document with all figures on stdout.
      model: the shape of the model, which with --init is that model's; the vocabulary is the data's.
      training: how it is trained.
      devices: on what, and how several processes find each other.
      given: names of the settings that were given; the others are the preset's.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "--accumulate": "--grad-accum-steps",
        "--embedding-rate": "--embedding-learning-rate",
        "--final-rate": "--final-lr-fraction",
        "--cooldown": "--lr-schedule",
    }

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    data: Path
    out: Path
    init: Path | None = None
    compilation_cache: str = "auto"
    override: tyro.conf.FlagCreatePairsOff[bool] = False
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    model: _ModelOfData
    training: _SettingsOfDevice
    devices: DeviceOptions = DeviceOptions()
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()

    @classmethod
    def of_preset(cls, name: str) -> Callable[..., "TrainOptions"]:
        """Return the constructor with the settings of a preset as its defaults."""
        preset = find_preset(name)
        model = _ModelOfData(**dataclasses.asdict(preset.model(GPT2_VOCAB_SIZE)))
        return functools.partial(
            cls, model=model, training=_SettingsOfDevice(**dataclasses.asdict(preset.train))
        )


def train_options(preset: str, *, data: Path, out: Path, **settings: Any) -> TrainOptions:
    """Return the options of `jaxgpt train` from Python.

    Args:
      preset: whose settings are taken where none is given.
      data: dataset folder.
      out: run folder.
      settings: others by the names of their flags, such as n_layer, learning_rate, mesh, init; None is as
        not given.

    Raises:
      UserError: there is no such preset or setting.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    options = TrainOptions.of_preset(preset)(preset=preset, data=data, out=out, given=frozenset(given))
    changed: dict[str, Any] = {name: given.pop(name) for name in BESIDE if name in given}
    names = set(BESIDE)
    for group in ("model", "training", "devices"):
        before = getattr(options, group)
        fields = {field.name for field in dataclasses.fields(before)} - {"vocab_size"}  # the data's
        names |= fields
        changed[group] = dataclasses.replace(
            before, **{name: given.pop(name) for name in fields & given.keys()}
        )
    for name in given:
        raise UserError(f"a training has no setting {name!r}; {nearest(name, sorted(names))}")
    return dataclasses.replace(options, **changed)


def with_settings_of_run(options: TrainOptions) -> TrainOptions:
    """Take what is not given from the run that is changed (--override).

    Raises:
      UserError: there is none, or it began from another preset.
    """
    from jaxgpt.training.run.folder import read_run_config

    run = read_run_config(options.out)
    if run.preset in PRESETS and run.preset != options.preset:
        raise UserError(
            f"{options.out} began from preset {run.preset}, the command names {options.preset}; --override "
            f"keeps what is not given, so name {run.preset} and give each setting that changes"
        )
    there = {**dataclasses.asdict(run.model), **dataclasses.asdict(run.train)}

    def kept(settings: Any) -> Any:
        names = {field.name for field in dataclasses.fields(settings)} - options.given
        return dataclasses.replace(settings, **{name: there[name] for name in names})

    return dataclasses.replace(
        options,
        preset=run.preset,
        model=kept(options.model),
        training=kept(options.training),
        given=options.given | frozenset(there),
    )


def run_config(
    options: TrainOptions, dataset: "Dataset", init_source: "InitSource | None" = None
) -> "RunConfig":
    """Combine preset, data, the model to begin with and options.

    The precision is the preset's where none is given: see as_begun. `init` is still None: what it holds
    is known when the parameters are read.

    Raises:
      UserError: a setting that no model or training can have, or another model than that of --init.
    """
    from jaxgpt.training.run.folder import RunConfig, data_entry

    if init_source is None:
        model = model_config(dataclasses.replace(options.model, vocab_size=dataset.vocab_size))
    else:
        init_source.check_dataset(dataset)
        model = _model_of_init(init_source, options)
    train = train_config(options.training)
    check_optimizer(train.optimizer)
    return RunConfig(options.preset, model, train, data_entry(dataset))


def model_config(settings: ModelSettings) -> ModelConfig:
    """Return settings as a ModelConfig, which checks them."""
    return ModelConfig(**dataclasses.asdict(settings))


def train_config(settings: TrainSettings) -> TrainConfig:
    """Return settings as a TrainConfig, which checks them."""
    return TrainConfig(**dataclasses.asdict(settings))


def _model_of_init(init_source: "InitSource", options: TrainOptions) -> ModelConfig:
    """Return the model of --init, with what may differ; UserError when an option asks for another shape."""
    asked, there = options.model, init_source.model
    for name in ("n_layer", "n_head", "n_embd", "positions", "tied"):
        if name in options.given and getattr(asked, name) != getattr(there, name):
            flag = _as_given(name, getattr(asked, name))
            has = _as_given(name, getattr(there, name)).split()[-1]
            raise UserError(
                f"{flag}: the model of --init {init_source.folder} has {has}; leave {flag.split()[0]} out"
            )
    block_size = asked.block_size if "block_size" in options.given else there.block_size
    # Of a start that only the resumed run tells of, its own context is known: that run says what differs.
    if block_size > there.block_size and init_source.known is None:
        raise UserError(
            f"--block-size {block_size}: the model of --init {init_source.folder} has {there.block_size} "
            f"positions; give at most {there.block_size}, or leave --block-size out"
        )
    free = {name: getattr(asked, name) for name in ("dropout", "attn_dropout", "qat")}
    return dataclasses.replace(there, block_size=block_size, **free)


def _as_given(name: str, value: object) -> str:
    """Return a setting as the command line has it: --n-layer 2, --no-tied."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def as_begun(config: "RunConfig", folder: Path, given: frozenset[str]) -> "RunConfig":
    """Take precision and eval_tokens from the run in a folder where they are not given.

    Args:
      config: of the training.
      folder: its run folder. Where no run is in it, the precision is what this device is best at.
      given: names of the settings that were given.
    """
    from jaxgpt.training.devices.precision import best_precision
    from jaxgpt.training.run.folder import read_run_config

    if (folder / "config.json").exists():
        began = read_run_config(folder).train
        taken: dict[str, Any] = {"precision": began.precision, "eval_tokens": began.eval_tokens}
    else:
        taken = {"precision": best_precision()} if "precision" not in given else {}
    taken = {name: value for name, value in taken.items() if name not in given}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **taken))
