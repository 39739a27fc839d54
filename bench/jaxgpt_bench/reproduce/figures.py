"""report.json of a reproduction, typed: the page and the blocks of docs/ are functions of it alone."""

import dataclasses
from typing import Any

from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData
from jaxgpt_bench.common.rows import (
    EarlierFigures,
    Machine,
    ParentDifference,
    ParseCount,
    Provenance,
    QualityRow,
    SpeedFigures,
    SpeedRow,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(JsonData):
    """When an output was made, as far as anything in it tells: date, commit and seconds that it took."""

    date: str | None = None
    commit: str | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEntry(JsonData):
    """What happened in a stage.

    Attributes:
      stage: its name.
      kept: its output was there and fits.
      seconds: that it took now.
      made: when its output was really made.
    """

    stage: str
    kept: bool
    seconds: float
    made: Made = Made()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingText(JsonData):
    """What the run was trained on: of the data set's manifest, and whether it is the earlier project's.

    Attributes:
      reading: how the text was read, where otherwise than by default.
    """

    source: str
    revision: str
    tokenizer: dict[str, Any]
    counts: dict[str, int]
    is_the_original_s: bool  # JSON's name of: the earlier project's
    manifest_sha256: str
    reading: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySummary(JsonData):
    """What the quality rows rest on; see `QualityFigures`.

    Attributes:
      parse_samples: samples a model whose parsing is counted.
      parse_tokens: their length at most.
    """

    reference: str
    val_tokens: int
    val_bytes: int
    windows: str
    parse_held_out: ParseCount
    xz_bits_per_byte: float
    date: str
    commit: str
    machine: Machine
    parse_samples: int
    parse_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproducedModel(QualityRow):
    """A quality row, with some figures of this project's fastest program for the model."""

    fastest: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verbatim(JsonData):
    """The longest run of tokens that stands word for word in the training text."""

    tokens: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(JsonData):
    """What a model wrote after a fixed prompt; `tokens` is its length."""

    prompt: str
    temperature: float
    model: str
    text: str
    finish_reason: str
    tokens: int
    verbatim: Verbatim


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherTextRow(JsonData):
    """A model's loss on text from elsewhere, nats a token and bits a byte."""

    name: str
    loss: float
    loss_increase: float
    difference_error: float | None
    parent: ParentDifference | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherTextFigures(JsonData):
    """Loss on a table of text from elsewhere.

    Attributes:
      file: its name.
      about: what its user says of it.
      documents: with text.
      tokens: that were predicted.
      bytes: of the texts.
      documents_shared_with_training: that share a run of tokens with the training text.
      documents_too_short_to_tell: to have such a run.
      xz_bits_per_byte: what xz -9e makes of it.
      rows: one a model.
      sha256: of the file; report.json alone has it.
    """

    file: str
    about: str
    documents: int
    tokens: int
    bytes: int
    documents_shared_with_training: int
    documents_too_short_to_tell: int = 0
    xz_bits_per_byte: float
    rows: tuple[OtherTextRow, ...]
    sha256: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap(JsonData):
    """Validation documents that share a run of tokens with the training text.

    Attributes:
      run_tokens: length of a run.
      documents: of the validation split.
      sharing: that share one.
      too_short: to have one.
      dropped: that shared one and were dropped when the data set was made.
    """

    run_tokens: int
    documents: int
    sharing: int
    too_short: int
    dropped: int | None = dataclasses.field(default=None, metadata=LEFT_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary(JsonData):
    """The longest verbatim runs of several texts: median, longest, and how many texts are whole runs."""

    name: str
    texts: int
    median_tokens: float
    max_tokens: int
    whole: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(JsonData):
    """What stands word for word in the training text; the first row is held-out code, the yardstick."""

    overlap: Overlap
    train_tokens: int
    summary: tuple[RunSummary, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction(Provenance):
    """All of report.json.

    Attributes:
      preset: of `jaxgpt-bench reproduce`.
      about: what the preset is.
      data: that was trained on.
      train: summary of the run, its curve, the step that was taken, and its settings (files of earlier
        versions have none).
      parity: PyTorch's float32 logits against Flax's.
      files: hashes of the float32 artifact.
      quality: what the models' rows rest on.
      models: one row each, the reference first.
      original: figures of the earlier project.
      speed: of every program.
      samples: of the fixed prompts.
      sampling: their seed, and their length at most.
      other_text: loss on text from elsewhere.
      memorization: what stands word for word in the training text.
      stages: in their order.
    """

    preset: str
    about: str
    data: TrainingText
    train: dict[str, Any]
    parity: dict[str, Any]
    files: dict[str, str]
    quality: QualitySummary
    models: tuple[ReproducedModel, ...]
    original: EarlierFigures
    speed: SpeedFigures
    samples: tuple[Sample, ...]
    sampling: dict[str, int]
    other_text: tuple[OtherTextFigures, ...]
    memorization: Memorization
    stages: tuple[StageEntry, ...]

    def model(self, name: str) -> ReproducedModel:
        """Return a model's row; KeyError where it was not measured."""
        return {model.name: model for model in self.models}[name]

    def total_rate(self, row: SpeedRow) -> float:
        """Return tokens a second over the whole time, the prompt's included."""
        return self.speed.settings.tokens / row.seconds.median
