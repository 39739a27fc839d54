"""What a reproduction shows, in figures: the sentences about them stand in sentences.jinja."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from jaxgpt_bench.common.formatting import is_within_error
from jaxgpt_bench.common.rows import SpeedRow
from jaxgpt_bench.reproduce.figures import OtherTextFigures, Reproduction, TrainingText
from jaxgpt_bench.speed.programs import FLAX, own_engines

FLOAT32, INT8 = "torch-fp32", "int8-dynamic"  # what the earlier project measured


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure in float32, and in INT8."""

    before: float
    after: float

    @property
    def times(self) -> float:
        """How many times as large it becomes."""
        return self.after / self.before

    @property
    def times_smaller(self) -> float:
        """How many times smaller it becomes."""
        return self.before / self.after

    @property
    def difference(self) -> float:
        """By how much it grows."""
        return self.after - self.before


Kind = Literal["same method", "fastest of any", "this project's", "from the earlier way"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedClaim:
    """Two speed rows, float32 and INT8.

    Attributes:
      kind: what is compared; only "same method" is judged against the earlier project, as in the others more
        changes than the numbers' width.
      rows: before and after.
      rates: their tokens a second, the prompt included.
    """

    kind: Kind
    rows: tuple[SpeedRow, SpeedRow]
    rates: Change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """The earlier project's claims, its figures and those of this run.

    Attributes:
      loss: validation loss, here and theirs.
      size: of the file, MB, here and theirs.
      speeds: by kind; None where a row was not measured.
      their_rates: tokens a second.
    """

    loss: Change
    their_loss: Change
    size: Change
    their_size: Change
    speeds: dict[Kind, SpeedClaim | None]
    their_rates: Change


def claims(report: Reproduction) -> Claims:
    """Compare this run with what the earlier project claimed."""
    before, after, theirs = report.model(FLOAT32), report.model(INT8), report.original
    return Claims(
        loss=Change(before.val_loss, after.val_loss),
        their_loss=Change(*theirs.val_loss),
        size=Change(before.size_mb, after.size_mb),
        their_size=Change(*theirs.size_mb),
        speeds=speed_claims(report),
        their_rates=Change(*theirs.tokens_per_s),
    )


def speed_claims(report: Reproduction) -> dict[Kind, SpeedClaim | None]:
    """Return what is compared, and the rows before and after."""
    rows = report.speed.rows

    def first(engine: str, precision: str, every_logit: bool = False) -> SpeedRow | None:
        wanted = (engine, precision, not every_logit, every_logit)
        return next(
            (row for row in rows if (row.engine, row.precision, row.cached, row.every_logit) == wanted), None
        )

    own = best_row(INT8, rows)
    pairs: dict[Kind, tuple[SpeedRow | None, SpeedRow | None]] = {
        "same method": (first("transformers", "fp32"), first("torch-quantize-dynamic", INT8)),
        "fastest of any": (
            fastest(row for row in rows if row.precision == "fp32"),
            fastest(row for row in rows if row.precision.startswith("int8")),
        ),
        "this project's": (best_row(FLOAT32, rows), own),
        "from the earlier way": (first("transformers", "fp32", every_logit=True), own),
    }
    found: dict[Kind, SpeedClaim | None] = {}
    for kind, (before, after) in pairs.items():
        found[kind] = None
        if before is not None and after is not None:
            rates = Change(report.total_rate(before), report.total_rate(after))
            found[kind] = SpeedClaim(kind=kind, rows=(before, after), rates=rates)
    return found


def best_row(name: str, rows: Iterable[SpeedRow]) -> SpeedRow | None:
    """Return the row of this project's fastest program for a model; None where none was measured.

    Args:
      name: of the model: flax-fp32, torch-fp32, int8-dynamic, ...
      rows: of `jaxgpt-bench generate`.
    """
    precision = name.rpartition("-")[2] if name.endswith("-fp32") else name
    return fastest(
        row
        for row in rows
        if row.precision == precision
        and row.engine in own_engines()
        and (row.engine == FLAX.engine) == (name == "flax-fp32")
    )


def fastest(rows: Iterable[SpeedRow]) -> SpeedRow | None:
    """Return the row with the shortest time from prompt to last token, of those with a KV cache."""
    return min((row for row in rows if row.cached), key=lambda row: row.seconds.median, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Cost:
    """What INT8 costs this model.

    Attributes:
      increase: of the validation loss, nats.
      error: its standard error, where it is known.
      unclear: it can't be told from none.
      parse: samples that parse; None where there are none.
    """

    increase: float
    error: float | None
    unclear: bool
    parse: int | None


def int8_cost(report: Reproduction) -> Int8Cost:
    """Return what INT8 costs this model."""
    row = report.model(INT8)
    share = row.parse_share
    return Int8Cost(
        increase=row.loss_increase,
        error=row.difference_error,
        unclear=is_within_error(row.loss_increase, row.difference_error),
        parse=None if share is None else round(share * report.quality.parse_samples),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherLoss:
    """Loss on a text from elsewhere, nats a token.

    Attributes:
      float32: of the first model.
      int8: None where it was not measured.
      least: over all models.
      largest: over all models.
      bits_per_byte: of the first model.
      fails: the first model takes more bits than xz.
    """

    float32: float
    int8: float | None
    least: float
    largest: float
    bits_per_byte: float
    fails: bool


def other_loss(text: OtherTextFigures) -> OtherLoss:
    """Return how float32 and INT8 do on a text from elsewhere, beside xz."""
    losses = {row.name: row.loss for row in text.rows}
    first = text.rows[0]
    return OtherLoss(
        float32=first.loss,
        int8=losses.get(INT8),
        least=min(losses.values()),
        largest=max(losses.values()),
        bits_per_byte=first.bits_per_byte,
        fails=first.bits_per_byte > text.xz_bits_per_byte,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextKind:
    """What kind of text was trained on.

    Attributes:
      kind: the earlier project's, the standard library, installed packages, or the user's own.
      packages: how many.
      requests: of code, programs with a request each, in place of functions with their docstrings.
      documentation: that of the packages too.
      name: of the user's own.
    """

    kind: Literal["earlier", "stdlib", "packages", "own"]
    packages: int = 0
    requests: bool = False
    documentation: bool = False
    name: str = ""


def text_kind(data: TrainingText) -> TextKind:
    """Tell the kind of a data set by its source."""
    if data.is_the_original_s:
        return TextKind(kind="earlier")
    requests = data.reading.get("code") == "requests"
    if data.source == "stdlib":
        return TextKind(kind="stdlib", requests=requests)
    if data.source.startswith("packages:"):
        return TextKind(
            kind="packages",
            packages=len(data.source.split(",")),
            requests=requests,
            documentation=any(not each.endswith(".py") for each in data.reading.get("include", ())),
        )
    return TextKind(kind="own", name=Path(data.source).name)


def parse_bound(samples: int) -> float:
    """Return how far two shares of samples must lie apart to differ: two standard errors, in percent."""
    return 100 * 2 * (2 * 0.25 / samples) ** 0.5
