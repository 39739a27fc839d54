"""What `jaxgpt-bench train` measures, typed: rows of training steps, and of a step's profile.

Files of every version are read, as in rows.py: what an older one lacks is None here.
"""

import dataclasses
from typing import Any

from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData
from jaxgpt_bench.common.rows import Provenance, Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindRow(JsonData):
    """What the kernels of one kind take of a step.

    Attributes:
      kind: such as "products, bf16"; "no kernel" is the time in which the device waits.
      ms: of a step. Where kernels run side by side, each takes its part of the time.
      share: of the step.
      kernels: that a step starts.
      tflops: 10^12 FLOP/s that were reached, where the step's HLO tells the FLOPs.
      gb_s: 10^9 bytes/s that were read and written, where the HLO tells the bytes.
      of_measured: share of the measured rate of a plain product, or of a plain copy.
      of_datasheet: share of the datasheet's peak, of products.
    """

    kind: str
    ms: float
    share: float
    kernels: float
    tflops: float | None
    gb_s: float | None
    of_measured: float | None
    of_datasheet: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRow(JsonData):
    """One kernel.

    Attributes:
      name: as the device's profiler calls it.
      kind: see KindRow.
      ms: of a step, all its starts together.
      share: of the step.
      count: how often a step starts it.
      tflops: see KindRow; so are gb_s and of_measured.
      op: the first HLO instruction that it belongs to, and how many more.
      source: line and function of this project that wrote them, where known.
    """

    name: str
    kind: str
    ms: float
    share: float
    count: float
    tflops: float | None
    gb_s: float | None
    of_measured: float | None
    op: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRow(JsonData):
    """What a function of this project takes of a step, by its kernels."""

    source: str
    ms: float
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProfile(JsonData):
    """Where a step's time goes.

    Attributes:
      steps: that were profiled, one right after the other.
      step_ms: from the first kernel's start to the last one's end, for each step; the kinds' sum.
      known: share of the kernels' time whose HLO instruction is known.
      product_tflops: measured rate of a plain matrix product by dtype, 10^12 FLOP/s.
      memory_gb_s: measured rate of a plain copy, bytes read and written.
      kinds: every kind, the largest first.
      kernels: the longest.
      sources: the functions with the longest kernels.
    """

    steps: int
    step_ms: float
    known: float
    product_tflops: dict[str, float]
    memory_gb_s: float | None
    kinds: tuple[KindRow, ...]
    kernels: tuple[KernelRow, ...]
    sources: tuple[SourceRow, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyTorchComparison(JsonData):
    """A trainer beside PyTorch, round by round, so that a slow moment of the machine falls on both.

    Attributes:
      step_time_ratio: ours / theirs.
      cpu_time_ratio: ours / theirs.
      first_losses_differ_by: largest difference of the warm-up steps' losses; None where the optimizers are
        not the same.
      losses_differ_by: of all.
      row: of PyTorch, the fastest.
    """

    step_time_ratio: Spread
    cpu_time_ratio: Spread
    first_losses_differ_by: float | None
    losses_differ_by: float | None
    row: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRow(JsonData):
    """A row of `jaxgpt-bench train`.

    Attributes:
      engine: jaxgpt or pytorch.
      devices: that it trained on.
      variant: settings in which it differs from the first row, or PyTorch's.
      tokens_per_step: of all devices.
      step_ms: of a step.
      step_cpu_ms: CPU time of a step.
      tokens_per_s: of all devices.
      cpu_ms_per_1000_tokens: median over rounds.
      product_share: of the FLOP/s that a plain matrix product reaches.
      mfu: of the datasheet's peak, where that is known.
      peak_rss_mb: of the process.
      device_mb: most memory allocated on a GPU.
      losses: of every step, the warm-up's first.
      startup_s: from the start of the process to the end of its first step.
      compile_s: compiling in that time.
      against_pytorch: where both took the same steps.
      against_first: time a token, in parts of the first row's, round by round.
      profile: where its time goes.
    """

    engine: str
    devices: int
    variant: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    tokens_per_step: int
    step_ms: Spread
    step_cpu_ms: Spread
    tokens_per_s: Spread
    cpu_ms_per_1000_tokens: float
    product_share: float
    mfu: float | None
    peak_rss_mb: float
    device_mb: float | None
    losses: tuple[float, ...]
    startup_s: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    compile_s: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    against_pytorch: PyTorchComparison | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    against_first: Spread | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    profile: StepProfile | None = dataclasses.field(default=None, metadata=LEFT_OUT)

    @property
    def name(self) -> str:
        """Name of the row."""
        return step_name(self.engine, self.devices, self.variant or "")


def step_name(engine: str, devices: int, variant: str) -> str:
    """Name a row of steps; see `StepRow` for the arguments."""
    return f"{engine} x{devices}{f', {variant}' if variant else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures(Provenance):
    """What `jaxgpt-bench train` leaves.

    Attributes:
      settings: what it was told.
      device: kind of the device.
      flops_per_token: forward and backward.
      product_tflops: of a plain matrix product, one a round.
      datasheet_tflops: None where it is not known.
      left_out: trainers that stopped, with why.
      rows: one a trainer.
    """

    settings: dict[str, Any]
    device: str
    flops_per_token: float
    product_tflops: Spread
    datasheet_tflops: float | None
    left_out: dict[str, str] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    rows: tuple[StepRow, ...]
