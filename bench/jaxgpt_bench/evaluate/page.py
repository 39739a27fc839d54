"""The block of docs/samples.md: answers to requests, float32 beside INT8, of committed figures."""

from collections.abc import Callable, Sequence

from jaxgpt_bench.common.tables import table
from jaxgpt_bench.evaluate.answers import REQUESTED
from jaxgpt_bench.evaluate.rows import Answer, AnswersRow, EvaluateFigures, HumanEvalRow
from jaxgpt_bench.evaluate.tables import ANSWERS, human_eval_table, samples_markdown
from jaxgpt_bench.sandbox.programs import MOST_REPEATS


def answers_block(figures: EvaluateFigures) -> str:
    """Return how good the answers are, the worst first, then each, drawn at the temperature above 0."""
    asked = [row for row in figures.answers if row.prompts == REQUESTED]
    drawn = [row for row in asked if row.temperature > 0]
    greedy = [row for row in asked if row.temperature == 0]
    parts = [
        f"Read this first: {_poor(drawn, greedy)}",
        table(ANSWERS, figures.answers).markdown(),
        *_human_eval(figures.human_eval),
        f"The answers at temperature {drawn[0].temperature:g}, drawn with the same random numbers:",
        samples_markdown(drawn),
    ]
    return "\n\n".join(part.strip() for part in parts)


def _poor(drawn: Sequence[AnswersRow], greedy: Sequence[AnswersRow]) -> str:
    fits = _counts(drawn, lambda answer: answer.fits)
    right = _counts(drawn, lambda answer: answer.passed is True)
    circles = _counts(greedy, lambda answer: answer.most_repeated > MOST_REPEATS)
    return (
        f"of {len(drawn[0].answers)} answers, {fits} are Python with a function whose name fits; {right} "
        f"**pass their check**. Greedy, {circles} repeat four tokens more than {MOST_REPEATS} times."
    )


def _counts(rows: Sequence[AnswersRow], what: Callable[[Answer], bool]) -> str:
    return ", ".join(f"{sum(map(what, row.answers))} in {_name(row)}" for row in rows)


def _name(row: AnswersRow) -> str:
    return {"fp32": "float32", "int8-dynamic": "INT8"}.get(row.kind, row.kind)


def _human_eval(rows: Sequence[HumanEvalRow]) -> list[str]:
    return ["HumanEval, beside what others published:", human_eval_table(rows).markdown()] if rows else []
