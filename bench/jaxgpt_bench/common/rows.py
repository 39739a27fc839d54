"""What is measured, typed: the rows and figures that the commands write as JSON and read back.

Each class is one object of the files in bench/results/. Files of every version are read: what an older one
lacks has a default here. Losses are in nats a token, MB are 10^6 bytes.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData


def speed_name(engine: str, precision: str, cached: bool, every_logit: bool, isa: str) -> str:
    """Name a row of speed; see `SpeedRow` for the arguments."""
    how = ("" if cached else ", no KV cache") + (", every logit" if every_logit else "")
    return f"{engine} {precision}{how}{f', {isa}' if isa else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(JsonData):
    """A figure over several rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Take median, min and max of what was measured, one value a round."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(JsonData):
    """What a figure was measured on.

    Attributes:
      cpu: its name.
      cores: that the process could use.
      memory_gb: of the machine, 10^9 bytes.
      instruction_sets: of those that matter for INT8.
      system: kernel.
      python: version.
      packages: versions by name.
      engine_sha256: of the native engine's library; None without one, and in files of before it was told.
    """

    cpu: str
    cores: int
    memory_gb: float
    instruction_sets: tuple[str, ...]
    system: str
    python: str
    packages: dict[str, str]
    engine_sha256: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(JsonData):
    """How quiet a machine was while something was measured; None is what it does not tell.

    Attributes:
      seconds: that were watched.
      load_before: threads that ran or waited, mean of the minute before.
      load_after: the same at the end, what was measured included.
      runnable_before: threads that ran or waited when it began, this program's own thread left out.
      runnable_after: at the end.
      others_cpu_share: of the cores' time that processes used which are neither ours nor our children.
      stolen_share: of the cores' time that the host of a virtual machine gave to others.
      pressure_some: share of the time in which some thread waited for a core, one of ours or another's.
      pressure_full: in which all did.
      probe_spread: (largest - least) / median of the rate that was measured in every round: of reading
        memory, or of a matrix product. Of generation the median row's, where that is more.
      accepted: somebody takes the figures however busy it was.
    """

    seconds: float
    load_before: float | None
    load_after: float | None
    runnable_before: int | None
    runnable_after: int | None
    others_cpu_share: float | None
    stolen_share: float | None
    pressure_some: float | None
    pressure_full: float | None
    probe_spread: float | None
    accepted: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance(JsonData):
    """What every committed result carries: machine, date (ISO, UTC), commit, command; of speed, noise."""

    machine: Machine
    date: str
    commit: str
    command: str = ""
    noise: Noise | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRound(JsonData):
    """What one round says of a row.

    Attributes:
      tokens_per_s: after the first.
      read_gb_s: read bandwidth right before and after, their mean.
      read_before_gb_s: the former.
      read_after_gb_s: the latter.
      ceiling_tokens_per_s: that this bandwidth allows.
      ceiling_share: of it that was reached.
    """

    tokens_per_s: float
    read_gb_s: float
    read_before_gb_s: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    read_after_gb_s: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    ceiling_tokens_per_s: float
    ceiling_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRow(JsonData):
    """A row of `jaxgpt-bench generate`.

    Attributes:
      engine: the program: jaxgpt-native, jaxgpt-torch, jaxgpt-flax or a peer's name.
      precision: fp32, int8-dynamic, int8-static, ...
      cached: with a KV cache.
      every_logit: asks for the logits of every position, of which only the last are used, as
        `model(ids).logits[:, -1]` does.
      isa: the native engine's instruction set; "" is the best.
      decode_tokens_per_s: after the first token.
      prefill_tokens_per_s: of the long prompt.
      seconds: of all tokens and the prompt.
      bytes_per_token: that a token reads: weights, keys and values.
      characters_per_s: of the text of these tokens; None where there is no tokenizer that means something.
      read_gb_s: read bandwidth of a buffer of that size, 10^9 bytes a second: the median round's.
      ceiling_tokens_per_s: read_gb_s / bytes_per_token.
      ceiling_share: each round's rate over the same round's ceiling, their median.
      ceiling_shares: that, with the least and the largest.
      by_round: rate, ceiling and share of each round.
      file_mb: what is loaded.
      peak_rss_mb: of the process.
      busy_tokens_per_s: beside busy processes.
      busy_share: of the free rate that remains then.
      settings: that were fastest on this machine.
      prompt_settings: those that took the long prompt fastest, where they are others.
      busy_settings: those that were fastest beside busy processes, where they are others.
      greedy_agrees: tokens before the first that differs from those of the first float32 row.
      greedy_tokens: that were generated.
    """

    engine: str
    precision: str
    cached: bool
    every_logit: bool
    isa: str = ""
    decode_tokens_per_s: Spread
    prefill_tokens_per_s: Spread
    seconds: Spread
    bytes_per_token: int
    read_gb_s: float
    ceiling_tokens_per_s: float
    ceiling_share: float
    ceiling_shares: Spread | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    by_round: tuple[SpeedRound, ...] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    characters_per_s: Spread | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    file_mb: float
    peak_rss_mb: float
    busy_tokens_per_s: Spread | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    busy_share: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    settings: dict[str, Any]
    prompt_settings: dict[str, Any] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    busy_settings: dict[str, Any] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    greedy_agrees: int | None
    greedy_tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the row."""
        return speed_name(self.engine, self.precision, self.cached, self.every_logit, self.isa)

    @property
    def shown_ceiling(self) -> float:
        """The ceiling of which the median rate is `ceiling_share`, in tokens a second.

        Where bandwidth changes between rounds, `ceiling_tokens_per_s`, of its median, may be another.
        """
        return self.decode_tokens_per_s.median / self.ceiling_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedSettings(JsonData):
    """What `jaxgpt-bench generate` was told.

    Attributes:
      preset: whose shape random weights have; None: a model that was trained.
      model: fields of ModelConfig.
      tokens: generated in each round.
      prompt_tokens: before them.
      prefill_tokens: of the long prompt.
      threads: CPU threads.
      busy_processes: that competed in the busy pass.
      batch: texts at a time.
      sampling: how the next token is chosen.
    """

    preset: str | None
    model: dict[str, Any]
    tokens: int
    prompt_tokens: int
    prefill_tokens: int = 0
    threads: int
    busy_processes: int = 0
    batch: int = 1
    sampling: str = "greedy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedFigures(Provenance):
    """What `jaxgpt-bench generate` leaves.

    Attributes:
      settings: what it was told.
      rounds: in each of which every row was measured once.
      bandwidth_gb_s: of a buffer of 1 GB, one a round.
      left_out: rows that could not be measured, with why.
      rows: one a contestant.
    """

    settings: SpeedSettings
    rounds: int
    bandwidth_gb_s: tuple[float, ...]
    left_out: dict[str, str]
    rows: tuple[SpeedRow, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParentDifference(JsonData):
    """How far a model is from the float32 artifact that it was made of.

    Attributes:
      name: row of the parent.
      difference: of the losses.
      difference_error: its standard error over windows.
      kl_mean: KL divergence.
      top1: share of positions with the same most probable token.
    """

    name: str
    difference: float
    difference_error: float | None
    kl_mean: float
    top1: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityRow(JsonData):
    """A row of `jaxgpt-bench quality`; KL and logits are against the first row, None there.

    Errors are standard errors over windows.

    Attributes:
      name: flax-fp32, torch-fp32, int8-dynamic, ...
      val_loss: nats a token.
      loss_increase: above the first row's.
      difference_error: standard error of that over windows.
      parent: where the row has a parent other than the first.
      val_bits_per_byte: the loss for each byte of text.
      kl_mean: mean KL divergence over positions.
      kl_mean_error: its error.
      kl_p999: the KL divergence's 99.9th percentile.
      kl_p999_error: its error.
      kl_max: largest.
      max_abs_logit_diff: largest.
      rms_probability_change: root mean square of the change in probability of the right token.
      rms_probability_change_error: its error.
      top1_agreement: share of positions with the same most probable token.
      top1_error: its error.
      parse_share: share of samples that are Python.
      parse_cut: samples cut at the length limit.
      size_mb: of the file.
      settings: of the program, where they change what it computes.
      engine: the program that computed its logits: jaxgpt-native, jaxgpt-torch, jaxgpt-flax or a peer's name;
        None in files of earlier versions.
    """

    name: str
    val_loss: float
    loss_increase: float
    difference_error: float | None = None
    parent: ParentDifference | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    val_bits_per_byte: float
    kl_mean: float | None
    kl_mean_error: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    kl_p999: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    kl_p999_error: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    kl_max: float | None
    max_abs_logit_diff: float | None
    rms_probability_change: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    rms_probability_change_error: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    top1_agreement: float
    top1_error: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    parse_share: float | None
    parse_cut: int = 0
    size_mb: float
    settings: dict[str, Any] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    engine: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)

    @property
    def is_reference(self) -> bool:
        """Whether it is the row that others are compared with."""
        return self.kl_mean is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenText(JsonData):
    """A sample, or how a held-out document goes on.

    Attributes:
      text: after the prompt.
      finish_reason: stop, endoftext, length or context.
      parses: whether it is Python.
    """

    text: str
    finish_reason: str
    parses: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParseCount(JsonData):
    """How many texts are Python, and how many were cut at the length limit."""

    texts: int
    parse: int
    cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityFigures(Provenance):
    """What `jaxgpt-bench quality` leaves.

    Attributes:
      reference: name of the first row.
      val_tokens: that were predicted.
      val_bytes: that these tokens are.
      windows: which windows of the split were taken.
      xz_bits_per_byte: what xz -9e makes of the same bytes.
      left_out: programs that could not be measured, with why; None where none was asked for.
      rows: one a model.
      parse_held_out: how much of the held-out documents' own code parses.
      prompts: of the samples.
      held_out: how the prompts' documents go on.
      samples: by model.
    """

    reference: str
    val_tokens: int
    val_bytes: int
    windows: str = ""
    xz_bits_per_byte: float
    left_out: dict[str, str] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    rows: tuple[QualityRow, ...]
    parse_held_out: ParseCount
    prompts: tuple[str, ...]
    held_out: tuple[WrittenText, ...]
    samples: dict[str, tuple[WrittenText, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierFigures(JsonData):
    """What the earlier project published: float32, then INT8."""

    val_loss: tuple[float, ...]
    size_mb: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
