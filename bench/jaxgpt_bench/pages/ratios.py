"""How many times as fast as every other program the engine is: a row a program, a column a processor."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxgpt_bench.common.rows import SpeedFigures, SpeedRow
from jaxgpt_bench.common.tables import Table
from jaxgpt_bench.pages.headline import NAMES
from jaxgpt_bench.speed.programs import NATIVE, own_engines


@dataclasses.dataclass(frozen=True)
class Weights:
    """Precisions that are compared with each other.

    Attributes:
      name: of the weights, as the table has it.
      ours: the engine's precisions, of which the first that was measured counts.
      theirs: what the other programs' precisions begin with, of which the fastest counts.
    """

    name: str
    ours: tuple[str, ...]
    theirs: str


WEIGHTS = (
    Weights("8 bits", ("int8-dynamic",), "int8"),
    Weights("4 bits, jaxgpt's head in 8", ("int4-dynamic", "int4-weight-only"), "int4"),
    Weights("4 bits", ("int4-dynamic-head", "int4-weight-only-head"), "int4"),
    Weights("float32", ("fp32",), "fp32"),
)


def generation(row: SpeedRow) -> float:
    """Return tokens a second after the first."""
    return row.decode_tokens_per_s.median


def at_equal_bandwidth(row: SpeedRow) -> float:
    """Return the rate at one byte a second: what generation would be, had memory been read equally fast."""
    return row.ceiling_share / row.bytes_per_token


def prompts(row: SpeedRow) -> float:
    """Return a long prompt's tokens a second."""
    return row.prefill_tokens_per_s.median


def beside_others(row: SpeedRow) -> float | None:
    """Return tokens a second beside busy processes; None where that was not measured."""
    return None if row.busy_tokens_per_s is None else row.busy_tokens_per_s.median


def markdown_block(machines: Mapping[str, SpeedFigures], busy: Mapping[str, SpeedFigures]) -> str:
    """Return a table for generation, prompts, and generation beside busy processes.

    Args:
      machines: figures of GPT-2's shape, by the processor's name.
      busy: those measured beside busy processes.
    """
    tables = (
        ratio_table("generation", generation, machines),
        ratio_table("generation, had memory been read equally fast", at_equal_bandwidth, machines),
        ratio_table("prompts", prompts, machines),
        ratio_table("generation beside two busy processes", beside_others, busy),
    )
    return "\n\n".join(each.markdown() for each in tables)


def ratio_table(
    title: str, quantity: Callable[[SpeedRow], float | None], machines: Mapping[str, SpeedFigures]
) -> Table:
    """Return a table of ratios; beside those of generation stand the rounds' and shares of the ceiling."""
    rows = []
    for weights in WEIGHTS:
        pairs = [_pairs(weights, quantity, figures.rows) for figures in machines.values()]
        for engine in dict.fromkeys(name for found in pairs for name in found):
            cells = [_cell(quantity, *found[engine]) if engine in found else "" for found in pairs]
            rows.append((f"{NAMES.get(engine, engine)}, {weights.name}", *cells))
    return Table((f"{title}: times as fast as", *machines), tuple(rows))


def _pairs(
    weights: Weights, quantity: Callable[[SpeedRow], float | None], rows: Sequence[SpeedRow]
) -> dict[str, tuple[SpeedRow, SpeedRow]]:
    """Return the engine's row and the fastest of each other program, by the program's name."""
    measured = [row for row in rows if row.cached and not row.isa and quantity(row)]
    own = {row.precision: row for row in measured if row.engine == NATIVE.engine}
    ours = next((own[precision] for precision in weights.ours if precision in own), None)
    if ours is None:
        return {}
    found: dict[str, tuple[SpeedRow, SpeedRow]] = {}
    for row in measured:
        if row.engine in own_engines() or not row.precision.startswith(weights.theirs):
            continue
        if row.engine not in found or _value(quantity, row) > _value(quantity, found[row.engine][1]):
            found[row.engine] = (ours, row)
    return found


def _value(quantity: Callable[[SpeedRow], float | None], row: SpeedRow) -> float:
    return quantity(row) or 0.0


def _cell(quantity: Callable[[SpeedRow], float | None], ours: SpeedRow, theirs: SpeedRow) -> str:
    ratio = f"{_value(quantity, ours) / _value(quantity, theirs):.2f}"
    if quantity is not generation:
        return ratio
    shares = f"{ours.ceiling_share:.0%} : {theirs.ceiling_share:.0%} of the ceiling"
    return f"{ratio} ({'; '.join([*_rounds_text(ours, theirs), shares])})"


def _rounds_text(ours: SpeedRow, theirs: SpeedRow) -> list[str]:
    """Return the smallest and the largest ratio of a round, where a file has its rounds."""
    rounds = zip(ours.by_round or (), theirs.by_round or (), strict=False)
    found = [one.tokens_per_s / other.tokens_per_s for one, other in rounds]
    return [f"{min(found):.2f}-{max(found):.2f}"] if found else []
