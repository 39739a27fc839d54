"""Held-out functions: how a model goes on from the middle of their code, and what it finds of them likely."""

import dataclasses
import math
from collections.abc import Sequence

from jaxgpt.data.requests.repetition import most_repeated
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.scoring import log_probabilities
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.evaluate.answers import speed_of, split_document
from jaxgpt_bench.evaluate.rows import FunctionsRow, Measured
from jaxgpt_bench.evaluate.statistics import mean_and_error, paired_difference
from jaxgpt_bench.evaluate.writers import Writer, scorer_of, shown, write_all
from jaxgpt_bench.sandbox.programs import FENCE, MOST_REPEATS, edit_similarity, parses, program_of


@dataclasses.dataclass(frozen=True)
class HeldOutFunction:
    """A held-out document, cut before a line in the middle of its code.

    The prompt has no white space at its end: a tokenizer trained on code has tokens of a line end with the
    indentation after it, and a prompt that ends in a line end has cut one of them in two.

    Attributes:
      document: the whole text.
      prompt: all before the cut, up to the end of its last line that is not blank.
      code: the part of the prompt that is code.
      next_line: what follows, one line without its end.
    """

    document: str
    prompt: str
    code: str
    next_line: str


def held_out_functions(
    documents: Sequence[str], tokenizer: Tokenizer, block_size: int, longest: int, count: int
) -> list[HeldOutFunction]:
    """Cut documents with three lines of code or more, evenly spread over all.

    Args:
      documents: of the validation split.
      tokenizer: of the models.
      block_size: tokens that a model's context holds: documents that do not fit are passed over.
      longest: tokens that are written.
      count: how many are wanted; fewer where fewer fit.

    Raises:
      UserError: none fits.
    """
    found: list[HeldOutFunction] = []
    for document in documents:
        function = cut_in_the_middle(document)
        if function is None or len(tokenizer.encode(document)) > block_size:
            continue
        if len(tokenizer.encode(function.prompt)) + longest <= block_size:
            found.append(function)
    if not found:
        raise UserError(
            f"no held-out document with three lines of code leaves room for {longest} tokens in a context "
            f"of {block_size}; lower --tokens"
        )
    step = max(len(found) / count, 1.0)
    return [found[int(place * step)] for place in range(min(count, len(found)))]


def cut_in_the_middle(document: str) -> HeldOutFunction | None:
    """Cut a document before the middle one of its code's lines that are not blank; None below three."""
    _, fenced = split_document(document)
    code = program_of(fenced).code if fenced.startswith(FENCE) else fenced
    lines = code.splitlines(keepends=True)
    written = [place for place, line in enumerate(lines) if line.strip()]
    if len(written) < 3:
        return None
    middle = written[len(written) // 2]
    known = "".join(lines[:middle]).rstrip()
    end = document.index(code) + len(known)
    return HeldOutFunction(document, document[:end], known, lines[middle].rstrip("\n"))


def next_line_of(text: str) -> tuple[str, bool]:
    """Return the line that a text writes after a prompt's last one, and whether it begins on its own.

    A text that goes on with the prompt's last line has written no next one: that is what it answers.

    Returns:
      line: the first that is not blank, without white space at its end; "" where there is none.
      begins: whether a line end stands before it.
    """
    same, _, rest = text.partition("\n")
    if same.strip():
        return same.rstrip(), False
    line = next((line for line in rest.splitlines() if line.strip()), "")
    return line.rstrip(), line != ""


@dataclasses.dataclass
class _Scores:
    """One value a function."""

    next_line: list[float] = dataclasses.field(default_factory=list)
    edit_similarity: list[float] = dataclasses.field(default_factory=list)
    parses: list[float] = dataclasses.field(default_factory=list)
    repeats: list[float] = dataclasses.field(default_factory=list)
    bits_per_byte: list[float] = dataclasses.field(default_factory=list)


def evaluate_functions(
    writers: Sequence[Writer], functions: Sequence[HeldOutFunction], longest: int
) -> list[FunctionsRow]:
    """Let each model go on greedily; the first one is what the others are compared with."""
    rows: list[FunctionsRow] = []
    first: _Scores | None = None
    for writer in writers:
        greedy = [Sampling(0.0)] * len(functions)
        texts = write_all(writer, [each.prompt for each in functions], longest, greedy)
        scores = _Scores()
        for function, text in zip(functions, texts.written, strict=True):
            line, begins = next_line_of(text.text)
            scores.next_line.append(float(begins and line == function.next_line.rstrip()))
            scores.edit_similarity.append(edit_similarity(line.strip(), function.next_line.strip()))
            scores.parses.append(float(parses(function.code + text.text.partition(FENCE)[0])))
            scores.repeats.append(float(most_repeated(text.tokens) > MOST_REPEATS))
        scorer = scorer_of(writer)
        for function in shown(functions, f"{writer.kind} reads", len(functions)):
            tokens = writer.tokenizer.encode(function.document)
            likely = log_probabilities(scorer, tokens, writer.tokenizer.endoftext)
            scores.bits_per_byte.append(-likely.sum() / math.log(2) / len(function.document.encode()))
        found = {
            field.name: measured(
                getattr(scores, field.name), None if first is None else getattr(first, field.name)
            )
            for field in dataclasses.fields(scores)
        }
        first = first or scores
        rows.append(FunctionsRow(model=writer.name, kind=writer.kind, speed=speed_of(texts), **found))
    return rows


def measured(values: Sequence[float], reference: Sequence[float] | None) -> Measured:
    """Return a mean over texts, and its difference from the reference's, text by text."""
    value, error = mean_and_error(values)
    if reference is None:
        return Measured(value=value, error=error)
    difference, difference_error = paired_difference(values, reference)
    return Measured(value=value, error=error, difference=difference, difference_error=difference_error)
