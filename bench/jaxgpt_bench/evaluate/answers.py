"""Programs for requests: whether they parse, name their function fittingly, end, repeat, and are right."""

import dataclasses
from collections.abc import Sequence

from jaxgpt.data.requests.repetition import most_repeated
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.state import Generation
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.evaluate.requests import CodeRequest
from jaxgpt_bench.evaluate.rows import Answer, AnswersRow, Speed
from jaxgpt_bench.evaluate.writers import Texts, Writer, write_all
from jaxgpt_bench.quality.samples import spread_evenly
from jaxgpt_bench.sandbox.programs import Program, parses, program_of
from jaxgpt_bench.sandbox.sandbox import Outcome, run_programs

REQUESTED, HELD_OUT = "requests", "held-out docstrings"
NO_FUNCTION = Outcome(False, "no function whose name fits")


def speed_of(texts: Texts) -> Speed:
    """Return how fast texts were written."""
    return Speed(tokens_per_s=texts.tokens_per_s, characters_per_s=texts.characters_per_s)


def answer_requests(
    writer: Writer,
    requests: Sequence[CodeRequest],
    drawn: Sampling,
    longest: int,
    request_end: str = "",
) -> AnswersRow:
    """Answer each request, with random numbers of its place; check what was written.

    Args:
      writer: the model.
      requests: what is asked for.
      drawn: how its tokens are; its seed is of the first request's random numbers, the others' follow.
      longest: tokens of an answer at most.
      request_end: what stands behind a request in the text that the model was trained on.
    """
    samplings = _of_each(drawn, len(requests))
    texts = write_all(writer, [request.text + request_end for request in requests], longest, samplings)
    programs = [program_of(text.text) for text in texts.written]
    names = [
        program.function_that(request.fits) or "" for request, program in zip(requests, programs, strict=True)
    ]
    checks = {
        place: f"{programs[place].code}\n\nf = {name}\n{requests[place].check}\n"
        for place, name in enumerate(names)
        if name
    }
    ends = dict(zip(checks, run_programs(list(checks.values())), strict=True))
    answers = []
    for place, request in enumerate(requests):
        end = ends.get(place, NO_FUNCTION)
        answers.append(_answer(request.text, texts.written[place], programs[place], names[place], end))
    return _row(writer, REQUESTED, drawn, answers, texts)


def answer_docstrings(writer: Writer, documents: Sequence[str], drawn: Sampling, longest: int) -> AnswersRow:
    """Answer the beginnings of held-out documents, up to their code; there is no check to pass.

    A function fits whose name is that of the document's own first function.
    """
    asked = [split_document(document) for document in documents]
    samplings = _of_each(drawn, len(asked))
    texts = write_all(writer, [prompt for prompt, _ in asked], longest, samplings)
    answers = []
    for (prompt, code), text in zip(asked, texts.written, strict=True):
        program, own = program_of(text.text), (program_of(code).functions or ("",))[0]
        name = own if own in (program.functions or ()) else ""
        answers.append(_answer(prompt.strip(), text, program, name, None))
    return _row(writer, HELD_OUT, drawn, answers, texts)


def _of_each(drawn: Sampling, count: int) -> list[Sampling]:
    return [dataclasses.replace(drawn, seed=drawn.seed + place) for place in range(count)]


def _answer(prompt: str, text: Generation, program: Program, name: str, end: Outcome | None) -> Answer:
    return Answer(
        prompt=prompt,
        text=text.text,
        finish_reason=text.finish_reason,
        parses=parses(program.code),
        function=name,
        passed=None if end is None else end.passed,
        why="" if end is None else end.why,
        most_repeated=most_repeated(text.tokens),
    )


def _row(
    writer: Writer, prompts: str, drawn: Sampling, answers: Sequence[Answer], texts: Texts
) -> AnswersRow:
    return AnswersRow(
        model=writer.name,
        kind=writer.kind,
        prompts=prompts,
        temperature=drawn.temperature,
        min_p=drawn.min_p,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        seed=drawn.seed,
        repetition_penalty=drawn.repetition_penalty if drawn.repetition_penalty != 1 else None,
        no_repeat_ngram_size=drawn.no_repeat_ngram_size or None,
        weights_sha256=writer.weights_sha256,
        answers=tuple(answers),
        speed=speed_of(texts),
    )


def split_document(document: str) -> tuple[str, str]:
    """Return a document's request and its code, which begins at the fence; ("", document) without one.

    A line end belongs to the request, whose end it tells; a space to the code: it is part of its first token.
    """
    head, fence, rest = document.partition("```")
    return (head.rstrip(" "), fence + rest) if fence and head.strip() else ("", document)


def request_end_of(documents: Sequence[str]) -> str:
    """Return what ends the request in most documents: a line end, or nothing."""
    requests = [request for request, _ in map(split_document, documents) if request]
    return "\n" if 2 * sum(request.endswith("\n") for request in requests) > len(requests) else ""


def spread_documents(documents: Sequence[str], count: int, tokenizer: Tokenizer, longest: int) -> list[str]:
    """Return so many of the documents that have code behind a request, evenly spread; all where fewer do.

    Args:
      documents: of the validation split.
      count: how many are wanted.
      tokenizer: of the models.
      longest: tokens of a request; documents with longer ones leave too little room for an answer.
    """
    requests = ((document, split_document(document)[0]) for document in documents)
    fenced = [
        document for document, request in requests if request and len(tokenizer.encode(request)) <= longest
    ]
    return [fenced[place] for place in spread_evenly(len(fenced), count)] if fenced else []
