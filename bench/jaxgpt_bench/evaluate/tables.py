"""The tables of `jaxgpt-bench evaluate`."""

from collections.abc import Callable, Sequence

from jaxgpt_bench.common.formatting import rate_text
from jaxgpt_bench.common.tables import Column, Table
from jaxgpt_bench.evaluate.human_eval import ANCHORS, TOO_LONG
from jaxgpt_bench.evaluate.rows import Answer, AnswersRow, FunctionsRow, HumanEvalRow, Measured
from jaxgpt_bench.sandbox.programs import MOST_REPEATS

Draws = tuple[AnswersRow, ...]  # a model's answers to the same prompts, drawn once or several times


def draws_of(rows: Sequence[AnswersRow]) -> list[Draws]:
    """Put rows together that differ in their random numbers alone."""
    found: dict[tuple[str, str, float], list[AnswersRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.prompts, row.temperature), []).append(row)
    return [tuple(each) for each in found.values()]


def count_text(draws: Draws, what: Callable[[Answer], bool | None]) -> str:
    """Return how many answers are so, the mean over draws with the fewest and most; "" where none can be."""
    judged = [[so for so in map(what, row.answers) if so is not None] for row in draws]
    if not judged[0]:
        return ""
    counts = [sum(each) for each in judged]
    mean = f"{sum(counts) / len(counts):.1f}".removesuffix(".0")
    between = f" ({min(counts)} to {max(counts)})" if min(counts) < max(counts) else ""
    return f"{mean} of {len(judged[0])}{between}"


def how_drawn(row: AnswersRow) -> str:
    """Return how the tokens of a row were drawn."""
    cut = {
        "min-p": row.min_p,
        "top-k": row.top_k,
        "top-p": row.top_p if row.top_p < 1 else 0,
        "repetition penalty": row.repetition_penalty,
        "no repeated run of tokens:": row.no_repeat_ngram_size,
    }
    parts = [f"{name} {value:g}" for name, value in cut.items() if value]
    return ", ".join([f"temperature {row.temperature:g}", *parts])


def _column(title: str, what: Callable[[Answer], bool | None]) -> Column[Draws]:
    return Column[Draws](title, lambda draws: count_text(draws, what))


ANSWERS = (
    Column[Draws]("model", lambda draws: draws[0].kind),
    Column[Draws]("asked", lambda draws: draws[0].prompts),
    Column[Draws]("temperature", lambda draws: f"{draws[0].temperature:g}"),
    _column("parse, name fits", lambda answer: answer.fits),
    _column("end by themselves", lambda answer: answer.ended),
    _column(
        f"repeat four tokens more than {MOST_REPEATS} times",
        lambda answer: answer.most_repeated > MOST_REPEATS,
    ),
    _column(
        f"four words more than {MOST_REPEATS} times",
        lambda answer: answer.most_repeated_words > MOST_REPEATS,
    ),
    _column("pass their check", lambda answer: answer.passed),
)


def _share(found: Measured, scale: float = 100.0, unit: str = "%") -> str:
    text = f"{found.value * scale:.3g} {unit}".strip()
    if found.difference is None:
        return text if found.error is None else f"{text} ± {found.error * scale:.2g}"
    error = "" if found.difference_error is None else f" ± {found.difference_error * scale:.2g}"
    return f"{text} ({found.difference * scale:+.2g}{error})"


FUNCTIONS = (
    Column[FunctionsRow]("model", lambda row: row.kind),
    Column[FunctionsRow]("next line right", lambda row: _share(row.next_line)),
    Column[FunctionsRow]("edit similarity", lambda row: _share(row.edit_similarity)),
    Column[FunctionsRow]("parse", lambda row: _share(row.parses)),
    Column[FunctionsRow]("repeat", lambda row: _share(row.repeats)),
    Column[FunctionsRow]("bits a byte", lambda row: _share(row.bits_per_byte, 1.0, "")),
    Column[FunctionsRow]("tokens/s", lambda row: rate_text(row.speed.tokens_per_s)),
    Column[FunctionsRow]("characters/s", lambda row: rate_text(row.speed.characters_per_s)),
)


def human_eval_table(rows: Sequence[HumanEvalRow]) -> Table:
    """Return pass@k of each model, and what others published."""
    ks = [each.k for each in rows[0].pass_at]
    titles = ("model", *(f"pass@{k}" for k in ks), "smallest difference shown")
    lines = [
        (
            row.kind,
            *(_share(each.score) for each in row.pass_at),
            ", ".join(f"{each.smallest_shown:.1%}" for each in row.pass_at),
        )
        for row in rows
    ]
    published = [(anchor.model, *(f"{anchor.pass_at[k]:.2%}" for k in ks), "published") for anchor in ANCHORS]
    return Table(titles, tuple(lines + published))


def human_eval_verdict(rows: Sequence[HumanEvalRow]) -> list[str]:
    """Say where a score is too small for what was measured."""
    return [
        f"{row.kind}: pass@{each.k} is {each.score.value:.2%}, and so few tries show differences from "
        f"{each.smallest_shown:.2%} on only: this says nothing of how models differ"
        for row in rows
        for each in row.pass_at
        if each.smallest_shown > each.score.value
    ] + [
        f"{row.kind}: {row.ends[TOO_LONG] // row.samples} of {len(row.passed)} problems are longer than its "
        "context; they count as not solved"
        for row in rows
        if TOO_LONG in row.ends
    ]


def samples_markdown(rows: Sequence[AnswersRow]) -> str:
    """Return every answer, the models' side by side under its prompt; of several draws the first."""
    rows = [draws[0] for draws in draws_of(rows)]
    lines: list[str] = []
    for place, first in enumerate(rows[0].answers if rows else ()):
        lines += [f"### {first.prompt}", ""]
        for row in rows:
            answer = row.answers[place]
            lines += [f"**{row.kind}**, {how_drawn(row)}: {_verdict(answer)}", ""]
            lines += ["````text", answer.text.strip("\n"), "````", ""]
    return "\n".join(lines)


def _verdict(answer: Answer) -> str:
    said = [
        "parses" if answer.parses else "does not parse",
        f"defines `{answer.function}`" if answer.function else "no function whose name fits",
        {"endoftext": "ended by itself", "stop": "ended by itself"}.get(answer.finish_reason, "cut"),
    ]
    if answer.most_repeated > MOST_REPEATS:
        said.append(f"repeats four tokens {answer.most_repeated} times")
    if answer.most_repeated_words > MOST_REPEATS:
        said.append(f"repeats four words {answer.most_repeated_words} times")
    if answer.passed is not None:
        said.append("**right**" if answer.passed else f"check: {answer.why}")
    return ", ".join(said)
