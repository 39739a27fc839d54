"""What a model and a training are: ModelConfig and TrainConfig, every field checked.

Their docstrings are the one place where a setting is documented: `jaxgpt train PRESET --help` shows them.
Standard library only, so that every part may read it.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxgpt.shared.errors import UserError, quoted

MAX_VOCAB_SIZE = 65_536  # tokens are stored as uint16
MAX_BLOCK_SIZE = 2**20
MAX_LAYERS = 4096
MAX_CHANNELS = 2**15  # the sums of 4 C products of bytes fit 32 bits
MAX_INT32 = 2**31 - 1  # steps and seeds are int32
MAX_CPU_DEVICES = 1024  # simulated at once; JAX makes them in 1 s, 4096 in 9 s and more not in minutes
Precision = Literal["fp32", "bf16", "fp16"]
Positions = Literal["learned", "rotary"]
ROTARY_BASE = 10_000.0
# Shares of the largest value that the scale of a static input may cover, when training or calibration chooses
# it; below 0.3 no layer of any tried model had its best.
CLIPPING_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def _require_types(config: Any, cls: type[Any]) -> None:
    """Raise UserError unless every field has a value of its type."""
    for field in dataclasses.fields(cls):
        value, choices = getattr(config, field.name), get_args(field.type)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if type(None) in choices:  # only numbers may be left open
            right, expected = value is None or is_number, "a number, or none"
        elif choices:
            right, expected = isinstance(value, str) and value in choices, " or ".join(choices)
        elif field.type is bool:
            right, expected = isinstance(value, bool), "true or false"
        elif field.type is int:
            right, expected = is_number and isinstance(value, int), "a whole number"
        elif field.type is float:
            right, expected = is_number, "a number"
        else:
            right, expected = isinstance(value, str), "a name"
        if not right:
            raise UserError(f"{field.name} ({quoted(value)}) must be {expected}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} ({quoted(getattr(config, name))}) must be at least 1")


def _from_json(cls: type[Any], value: Mapping[str, Any], where: str) -> Any:
    """Make a configuration from a JSON object; UserError names what it lacks, has besides, or has wrong."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    missing = sorted(
        name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in value
    )
    if unknown or missing:
        raise UserError(
            f"{where} does not fit this version: unknown fields {unknown or 'none'}, "
            f"missing fields {missing or 'none'}"
        )
    try:
        return cls(**value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2.

    Attributes:
      vocab_size: V, number of tokens.
      block_size: longest context, tokens.
      n_layer: L, number of blocks.
      n_head: H, attention heads a block.
      n_embd: C, channels.
      dropout: share of activations dropped in training, in [0, 1): of embeddings, of what attention and MLP
        add, and of attention weights.
      positions: "learned" (an embedding, as in GPT-2), or "rotary" (queries and keys are turned).
      tied: the head is the token embedding; else it has a matrix of its own.
      qat: quantization-aware training, usually of a trained model: weights and inputs of every linear layer
        are rounded as a static INT8 artifact rounds them; each layer has an input scale, which is trained.
      attn_dropout: share of attention weights dropped in training, in [0, 1); that of dropout if not given.
        Flash attention needs 0.

    Raises:
      UserError: a value that no GPT-2 can have.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    positions: Positions = "learned"
    tied: bool = True
    qat: bool = False
    attn_dropout: float | None = None

    def __post_init__(self) -> None:
        _require_types(self, ModelConfig)
        _require_positive(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(f"vocab_size ({self.vocab_size}) must be at most {MAX_VOCAB_SIZE}")
        if self.block_size > MAX_BLOCK_SIZE:
            raise UserError(f"block_size ({self.block_size}) must be at most {MAX_BLOCK_SIZE}")
        if self.n_layer > MAX_LAYERS:
            raise UserError(f"n_layer ({self.n_layer}) must be at most {MAX_LAYERS}")
        if self.n_embd > MAX_CHANNELS:
            raise UserError(f"n_embd ({self.n_embd}) must be at most {MAX_CHANNELS}")
        if self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            valid = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            raise UserError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}); "
                f"nearest valid n_embd: {valid}"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(f"rotary positions need an even head size, n_embd / n_head is {self.head_size}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout ({self.dropout}) must lie in [0, 1)")
        if self.attn_dropout is not None and not 0.0 <= self.attn_dropout < 1.0:
            raise UserError(f"attn_dropout ({quoted(self.attn_dropout)}) must lie in [0, 1)")

    @property
    def attn_rate(self) -> float:
        """Share of attention weights dropped in training."""
        return self.dropout if self.attn_dropout is None else self.attn_dropout

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.dropout > 0 or self.attn_rate > 0

    @property
    def head_size(self) -> int:
        """D, channels a head."""
        return self.n_embd // self.n_head

    def to_json(self) -> dict[str, Any]:
        """Return the fields; attn_dropout only where it is not that of dropout."""
        fields = dataclasses.asdict(self)
        if self.attn_dropout is None:
            del fields["attn_dropout"]
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read the fields from a JSON object; UserError names a missing, unknown or impossible one."""
        return _from_json(cls, value, where)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
      max_steps: optimizer steps.
      batch_size: sequences an optimizer step, all devices together.
      grad_accum_steps: micro-batches that a step's batch is cut into, to save memory.
      optimizer: of the blocks' matrices, such as adamw or muon (a file of jaxgpt/training/optimizers); AdamW
        for the rest.
      learning_rate: peak, of the blocks' matrices.
      embedding_learning_rate: peak, of everything else: embeddings, gains, biases, and input scales (as a
        share of them).
      final_lr_fraction: share of the peak rate that is left where its fall ends, one step after the last.
      warmup_steps: steps of linear rise from 0.
      lr_schedule: how the rate falls from its peak, "cosine" or "linear".
      decay_fraction: share of the steps after warm-up over which it falls; before, it stays at its peak.
      weight_decay: of matrices only, times the learning rate.
      beta1: momentum of AdamW, in [0, 1).
      beta2: second-moment decay of AdamW, in [0, 1).
      momentum: momentum of Muon, in [0, 1).
      momentum_warmup_steps: steps over which it rises from 0.85; 0 for none.
      split_qkv: Muon makes query, key and value of attention orthogonal apart, not as one matrix; their
        updates keep that matrix's scale, sqrt(3) times that of three matrices.
      grad_clip: largest global norm of a gradient.
      precision: of matrix products: "fp32", "bf16", or "fp16" with dynamic loss scaling; parameters,
        optimizer state and sums stay float32.
      low_precision_stream: the residual stream between blocks is in the compute dtype, too; this and the next
        four change nothing with fp32.
      low_precision_logits: a training's logits are in the compute dtype, too; the loss sums in float32, and
        validation has float32 logits.
      fused_layer_norm: LayerNorm keeps only its input for the backward pass.
      fused_gelu: GELU keeps only its input for the backward pass, and computes in float32.
      unfused_qkv: query, key and value are three products, so that none is cut out of a whole; not with qat.
      remat: keep only the stream between blocks for the backward pass, to save memory.
      loss_chunks: pieces in which the logits are computed, so that all of them never exist at once.
      vocab_multiple: the token table is padded with rows of zeros to a multiple, which tensor cores like; the
        logits of those rows count for nothing, and what is read from a checkpoint is without them.
      spike_guard: skip steps whose loss lies so many standard deviations above its running mean; 0 for none.
        The first 100 losses are unguarded, and after a change of data, batch size or prompt_loss_weight the
        next 100.
      max_skipped: skipped steps in a row after which the training stops.
      prompt_loss_weight: of what a data set made with --answers-only leaves out: 0 leaves it out, 1 counts it
        like the answers; between, so large a share of its tokens counts, drawn anew in each epoch. Validation
        leaves it out.
      seed: of initialization, data order and dropout.
      deterministic: on a GPU only kernels whose results repeat to the bit, so that a resumed training has the
        losses of one that ran through; slower. A CPU computes so anyway.
      eval_every: steps between measurements of the validation loss.
      eval_tokens: of the validation split that a measurement takes at most (one window at least), in windows
        spread evenly over it; 0 for all.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between samples; 0 for none.
    """

    max_steps: int = 1000
    batch_size: int = 32
    grad_accum_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 6e-4
    embedding_learning_rate: float = 6e-4
    final_lr_fraction: float = 0.1
    warmup_steps: int = 100
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    decay_fraction: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    momentum_warmup_steps: int = 0
    split_qkv: bool = False
    grad_clip: float = 1.0
    precision: Precision = "fp32"
    low_precision_stream: bool = False
    low_precision_logits: bool = False
    fused_layer_norm: bool = False
    fused_gelu: bool = False
    unfused_qkv: bool = False
    remat: bool = False
    loss_chunks: int = 1
    vocab_multiple: int = 1
    spike_guard: float = 0.0
    max_skipped: int = 20
    prompt_loss_weight: float = 0.0
    seed: int = 0
    deterministic: bool = False
    eval_every: int = 250
    eval_tokens: int = 0
    checkpoint_every: int = 250
    sample_every: int = 250

    def __post_init__(self) -> None:
        _require_types(self, TrainConfig)
        _require_positive(
            self,
            "max_steps",
            "batch_size",
            "grad_accum_steps",
            "loss_chunks",
            "vocab_multiple",
            "eval_every",
            "checkpoint_every",
        )
        for name in (
            "warmup_steps",
            "momentum_warmup_steps",
            "weight_decay",
            "final_lr_fraction",
            "eval_tokens",
            "sample_every",
            "seed",
            "spike_guard",
            "max_skipped",
        ):
            if not 0 <= getattr(self, name) <= sys.float_info.max:
                raise UserError(f"{name} ({quoted(getattr(self, name))}) must be 0 or more, and finite")
        for name in ("learning_rate", "embedding_learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) <= sys.float_info.max:
                raise UserError(f"{name} ({quoted(getattr(self, name))}) must be above 0, and finite")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} ({quoted(getattr(self, name))}) must lie in [0, 1)")
        for field in dataclasses.fields(TrainConfig):
            if field.type is int and getattr(self, field.name) > MAX_INT32:
                raise UserError(f"{field.name} ({quoted(getattr(self, field.name))}) must be below 2^31")
        if self.vocab_multiple > MAX_VOCAB_SIZE:
            raise UserError(f"vocab_multiple ({self.vocab_multiple}) must be at most {MAX_VOCAB_SIZE}")
        if self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"batch_size ({self.batch_size}) must be divisible by grad_accum_steps "
                f"({self.grad_accum_steps}); give both"
            )
        if not 0 <= self.prompt_loss_weight <= 1:
            raise UserError(f"prompt_loss_weight ({self.prompt_loss_weight}) must lie in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction ({self.decay_fraction}) must lie in (0, 1]")

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "TrainConfig":
        """Read the fields from a JSON object; UserError names a missing, unknown or impossible one."""
        return _from_json(cls, value, where)
