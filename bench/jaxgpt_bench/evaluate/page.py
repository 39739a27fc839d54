"""The block of docs/samples.md: answers to requests, float32 beside INT8, of committed figures."""

from collections.abc import Callable, Sequence

from jaxgpt_bench.common.tables import table
from jaxgpt_bench.evaluate.answers import REQUESTED
from jaxgpt_bench.evaluate.rows import Answer, AnswersRow, EvaluateFigures, HumanEvalRow
from jaxgpt_bench.evaluate.tables import (
    ANSWERS,
    Draws,
    count_text,
    draws_of,
    how_drawn,
    human_eval_table,
    samples_markdown,
)
from jaxgpt_bench.sandbox.programs import MOST_REPEATS


def answers_block(figures: EvaluateFigures) -> str:
    """Return how good the answers are, the worst first, then each, drawn at the temperature above 0."""
    asked = [row for row in figures.answers if row.prompts == REQUESTED]
    drawn = draws_of([row for row in asked if row.temperature > 0])
    greedy = draws_of([row for row in asked if row.temperature == 0])
    parts = [
        f"Read this first: {_poor(drawn, greedy)}",
        table(ANSWERS, draws_of(figures.answers)).markdown(),
        *_human_eval(figures.human_eval),
        f"The answers at {how_drawn(drawn[0][0])}, drawn with the same random numbers{_which(drawn)}:",
        samples_markdown([row for row in asked if row.temperature > 0]),
    ]
    return "\n\n".join(part.strip() for part in parts)


def _which(drawn: Sequence[Draws]) -> str:
    several = len(drawn[0])
    return f", the first of {several} draws; means and ranges are over all {several}" if several > 1 else ""


def _poor(drawn: Sequence[Draws], greedy: Sequence[Draws]) -> str:
    fits = _counts(drawn, lambda answer: answer.fits)
    right = _counts(drawn, lambda answer: answer.passed is True)
    means = f" (means of {len(drawn[0])} draws)" if len(drawn[0]) > 1 else ""
    tokens = _counts(greedy, lambda answer: answer.most_repeated > MOST_REPEATS)
    words = _counts(greedy, lambda answer: answer.most_repeated_words > MOST_REPEATS)
    return (
        f"of {len(drawn[0][0].answers)} answers{means}, {fits} are Python with a function whose name fits; "
        f"{right} **pass their check**. Greedy, {tokens} repeat four tokens more than {MOST_REPEATS} times, "
        f"{words} four words."
    )


def _counts(rows: Sequence[Draws], what: Callable[[Answer], bool]) -> str:
    counts = [(count_text(draws, what).partition(" of ")[0], draws[0]) for draws in rows]
    return ", ".join(f"{count} in {_name(row)}" for count, row in counts)


def _name(row: AnswersRow) -> str:
    return {"fp32": "float32", "int8-dynamic": "INT8"}.get(row.kind, row.kind)


def _human_eval(rows: Sequence[HumanEvalRow]) -> list[str]:
    return ["HumanEval, beside what others published:", human_eval_table(rows).markdown()] if rows else []
