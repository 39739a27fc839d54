"""What `jaxgpt train` may be told, and the configuration that follows from it; imports no JAX at its head."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset
from jaxgpt.training.optimizers import check_optimizer
from jaxgpt.training.run.folder import RunConfig, data_entry, read_run_config

if TYPE_CHECKING:
    from jaxgpt.training.run.init_from import InitSource


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a GPT-2; running the same command again resumes.

    Attributes:
      preset: tiny, small, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
      data: dataset folder of `jaxgpt prepare`; the vocabulary comes from it.
      out: the run folder.
      init: begin with the model of this folder: a run (its best checkpoint), or a float32 artifact, which is
        a Hugging Face GPT-2 folder; the shape comes from it, the training settings don't.
      qat: quantization-aware training: weights and inputs of linear layers are rounded as a static INT8
        artifact rounds them; usually with --init.
      max_steps: optimizer steps.
      seed: of initialization, data order and dropout.
      cpu_devices: simulate so many devices on the CPU (in each process); 0 takes the devices that JAX finds.
      mesh: layout of the devices, such as data=4,fsdp=2; all on data if not given.
      batch_size: sequences an optimizer step, all devices together.
      grad_accum_steps: micro-batches that a step's batch is cut into, to save memory.
      block_size: longest context, tokens.
      n_layer: blocks.
      n_head: attention heads.
      n_embd: channels.
      dropout: share of activations dropped.
      positions: learned, or rotary.
      optimizer: adamw, or muon for the blocks' matrices.
      learning_rate: peak, of the blocks' matrices.
      embedding_learning_rate: peak, of embeddings, gains and biases; with --qat also of input scales, as a
        share of them.
      final_lr_fraction: share of the peak that is left at the end.
      warmup_steps: steps of linear rise.
      lr_schedule: shape of the fall, cosine or linear.
      decay_fraction: share of the steps after warm-up over which it falls; constant before.
      weight_decay: of matrices.
      precision: of matrix products, fp32, bf16 or fp16 (with loss scaling); if not given, what the device
        is best at.
      remat: compute blocks again in the backward pass, to save memory.
      loss_chunks: pieces in which logits are computed, to save memory.
      vocab_multiple: pad the token table to a multiple while training; checkpoints are read without it.
      spike_guard: skip steps whose loss lies so many standard deviations above its mean; 0 for none.
      max_skipped: skipped steps in a row after which the training stops.
      eval_every: steps between validations.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between samples; 0 for none.
      distributed: one of several processes that JAX finds by itself (Slurm, Kubernetes, Open MPI).
      coordinator: host:port of process 0, where JAX can't find it.
      process_count: number of processes, with coordinator.
      process_index: which one this is, with coordinator.
      join_timeout: seconds to wait for the other processes.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "--accumulate": "--grad-accum-steps",
        "--embedding-rate": "--embedding-learning-rate",
        "--final-rate": "--final-lr-fraction",
        "--cooldown": "--lr-schedule",
    }

    preset: tyro.conf.Positional[str]
    data: Path
    out: Path
    init: Path | None = None
    qat: bool = False
    max_steps: int | None = None
    seed: int | None = None
    cpu_devices: int = 0
    mesh: str = ""
    batch_size: int | None = None
    grad_accum_steps: int | None = None
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float | None = None
    positions: Literal["learned", "rotary"] | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    embedding_learning_rate: float | None = None
    final_lr_fraction: float | None = None
    warmup_steps: int | None = None
    lr_schedule: Literal["cosine", "linear"] | None = None
    decay_fraction: float | None = None
    weight_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    remat: bool | None = None
    loss_chunks: int | None = None
    vocab_multiple: int | None = None
    spike_guard: float | None = None
    max_skipped: int | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    sample_every: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    join_timeout: int = 300
    json: bool = False


def run_config(options: TrainOptions, dataset: Dataset, init_source: "InitSource | None" = None) -> RunConfig:
    """Combine preset, data, the model to begin with and options.

    The precision is the preset's where none is given: see with_precision. `init` is still None: what it holds
    is known when the parameters are read.

    Raises:
      UserError: the options ask for another model than that of --init.
    """
    preset = find_preset(options.preset)
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    model = preset.model(dataset.vocab_size)
    if init_source is not None:
        init_source.check_dataset(dataset)
        _require_same_shape(init_source, given)
        model = dataclasses.replace(init_source.model, dropout=model.dropout)
    model = dataclasses.replace(model, **_fields_of(model, given))
    train = dataclasses.replace(preset.train, **_fields_of(preset.train, given))
    check_optimizer(train.optimizer)
    return RunConfig(options.preset, model, train, data_entry(dataset))


def _require_same_shape(init_source: "InitSource", given: dict[str, Any]) -> None:
    for name in ("n_layer", "n_head", "n_embd", "positions"):
        there = getattr(init_source.model, name)
        if given.get(name, there) != there:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} {given[name]}: the model of --init {init_source.folder} has {there}; "
                f"leave {option} out"
            )
    longest = init_source.model.block_size
    if given.get("block_size", longest) > longest:
        raise UserError(
            f"--block-size {given['block_size']}: the model of --init {init_source.folder} has {longest} "
            f"positions; give at most {longest}, or leave --block-size out"
        )


def with_precision(config: RunConfig, folder: Path) -> RunConfig:
    """Take the precision that a run began with, or what this device is best at."""
    from jaxgpt.training.devices.precision import best_precision

    began = (folder / "config.json").exists()
    precision = read_run_config(folder).train.precision if began else best_precision()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def _fields_of(target: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(target)}
    return {name: value for name, value in given.items() if name in names}
