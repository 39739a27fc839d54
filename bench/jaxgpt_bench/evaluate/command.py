"""`jaxgpt-bench evaluate`: what models can do, on the same prompts with the same random numbers.

    jaxgpt-bench evaluate --artifact FP32 INT8 --data DATA
    jaxgpt-bench evaluate --artifact FP32 INT8 --task human-eval --samples 200 --temperature 0.2

Tasks: "requests" (twenty requests for small programs, each checked), "docstrings" and "functions" (held-out
documents of --data), and "human-eval" (pass@k; the literature takes 200 samples, temperature 0.2 for pass@1
and 0.8 for pass@100, top-p 0.95). Programs run in a sandbox. Differences of functions and human-eval are
paired with the first model's; of requests and docstrings the table has counts, and their range over draws.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import prepare_output_file, write_atomic, write_json

if TYPE_CHECKING:
    from jaxgpt.generation.sampling import Sampling

Task = Literal["requests", "docstrings", "functions", "human-eval"]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure what models can do, on the same prompts with the same random numbers.

    Attributes:
      artifact: artifact folders; the others are compared with the first.
      task: what is measured; requests, and with --data docstrings and functions, if not given.
      data: dataset folder, whose validation documents the models were not trained on; if a line end stands
        behind their requests, then also behind those that are asked.
      temperature: of requests, docstrings and human-eval; both are asked greedily too but for human-eval. If
        not given, that of the first artifact, else 0.8, as `generate` has it.
      min_p: of requests and docstrings; if not given, that of the first artifact, else 0.05. Its top-k and
        top-p hold for them, too.
      repetition_penalty: of requests and docstrings, the greedy ones too; if not given, that of the first
        artifact, else 1 (none). See `jaxgpt-export generate`.
      no_repeat_ngram_size: as repetition_penalty; else 0 (any may repeat).
      draws: times that requests and docstrings are answered at the temperature, with other random numbers.
      top_p: of human-eval.
      tokens: of a text at most; human-eval 150 unless given.
      texts: held-out documents of each task.
      samples: programs a problem of human-eval, as --draws of requests.
      problems: HumanEval.jsonl.gz; that of the package human-eval if not given.
      slots: texts that the engine writes side by side.
      threads: that compute; 0 for all cores.
      seed: of the random numbers.
      page: also write every answer, of several draws the first, into this Markdown file.
      out: also write the figures into this JSON file.
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...]
    task: tuple[Task, ...] = ()
    data: Path | None = None
    temperature: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    draws: int = 1
    top_p: float = 0.95
    tokens: int | None = None
    texts: int = 20
    samples: int = 20
    problems: Path | None = None
    slots: int = 16
    threads: int = 0
    seed: int = 0
    page: Path | None = None
    out: Path | None = None
    json: bool = False


SETTINGS = (
    "temperature",
    "min_p",
    "draws",
    "top_p",
    "tokens",
    "texts",
    "samples",
    "slots",
    "seed",
)
APART = 10**6  # seeds of one draw and the next: each prompt takes one of its own
HELD_OUT_TASKS = ("docstrings", "functions")
LONGEST, LONGEST_HUMAN_EVAL, LONGEST_LINES = 250, 150, 64


def evaluate(options: EvaluateOptions) -> Result:
    """Run `jaxgpt-bench evaluate`."""
    for name in ("texts", "samples", "slots", "tokens", "draws"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} ({value}) must be at least 1")
    options = with_sampling(options)
    tasks = options.task or ("requests", *(HELD_OUT_TASKS if options.data else ()))
    for name in ("draws", *(["samples"] if "human-eval" in tasks else [])):
        if options.temperature == 0 and (count := getattr(options, name)) > 1:
            raise UserError(
                f"--{name} {count} needs a --temperature above 0: greedy answers are all the same"
            )
    if options.page is not None and not {"requests", "docstrings"} & set(tasks):
        raise UserError("--page shows answers to requests and docstrings; add one of these to --task")
    if options.data is None and set(tasks) & set(HELD_OUT_TASKS):
        raise UserError("held-out documents are those of a data set; name its folder: --data")
    samplings = _samplings(options)
    prepare_output_file(options.out)
    prepare_output_file(options.page, "--page")
    from jaxgpt_bench.common.provenance import provenance
    from jaxgpt_bench.evaluate.human_eval import default_file, read_problems
    from jaxgpt_bench.evaluate.rows import EvaluateFigures
    from jaxgpt_bench.evaluate.writers import open_writers
    from jaxgpt_bench.sandbox.sandbox import require_sandbox

    problems = read_problems(options.problems or default_file()) if "human-eval" in tasks else []
    require_sandbox()
    writers = open_writers(options.artifact, options.threads, options.slots)
    rows: dict[str, Any] = {"answers": (), "functions": (), "human_eval": ()}
    measure: dict[str, Callable[[], Iterable[Any]]] = {}
    if "requests" in tasks or "docstrings" in tasks:
        measure["answers"] = lambda: _answers(options, tasks, writers, samplings)
    if "functions" in tasks:
        functions = _functions(options, writers)  # what can't be asked is said before anything is written
        measure["functions"] = lambda: _go_on(options, writers, functions)
    if problems:
        _check_problems(writers, problems)
        measure["human_eval"] = lambda: _human_eval(options, writers, problems)
    settings = settings_of(options)
    left = list(measure)

    def figures() -> dict[str, Any]:
        about = vars(provenance())
        return EvaluateFigures(**rows, settings=settings, unfinished=tuple(left) or None, **about).to_json()

    for name, task in measure.items():
        for row in task():
            rows[name] += (row,)
            if options.out is not None:  # after each row, so that what comes next loses none of it
                write_json(options.out, figures())
        left.remove(name)
    written = figures()
    if options.out is not None:
        write_json(options.out, written)
    return Result(written)


def settings_of(options: EvaluateOptions) -> dict[str, Any]:
    """Return how texts are written, as `with_sampling` completed it; penalties only where there are any."""
    from jaxgpt.generation.sampling import NO_PENALTY

    penalties = {name: at for name, none in NO_PENALTY.items() if (at := getattr(options, name)) != none}
    return {name: getattr(options, name) for name in SETTINGS} | penalties


def with_sampling(options: EvaluateOptions) -> EvaluateOptions:
    """Return options with temperature, min-p and penalties of repetition.

    They are those of the first artifact where none were given, as `generate` has it.

    Raises:
      UserError: a value outside its range.
    """
    from jaxgpt.generation.sampling import NO_PENALTY

    drawn = _drawn(options)
    penalties: dict[str, Any] = {name: getattr(drawn, name) for name in NO_PENALTY}
    return dataclasses.replace(options, temperature=drawn.temperature, min_p=drawn.min_p, **penalties)


def _drawn(options: EvaluateOptions) -> "Sampling":
    """Return how the first draw is drawn."""
    from jaxgpt_export.format.generation_config import read_generation_config

    from jaxgpt.generation.sampling import NO_PENALTY, choose_sampling

    said = read_generation_config(options.artifact[0]) if options.artifact else {}
    asked = {name: getattr(options, name) for name in ("temperature", "min_p", *NO_PENALTY)}
    return choose_sampling(said, options.seed, **asked)


def _answers(
    options: EvaluateOptions, tasks: tuple[Task, ...], writers: Any, samplings: "Sequence[Sampling]"
) -> Iterator[Any]:
    from jaxgpt_bench.common.tables import table
    from jaxgpt_bench.evaluate.answers import (
        answer_docstrings,
        answer_requests,
        request_end_of,
        spread_documents,
    )
    from jaxgpt_bench.evaluate.requests import REQUESTS
    from jaxgpt_bench.evaluate.tables import ANSWERS, draws_of, samples_markdown

    longest = options.tokens or LONGEST
    found: list[Any] = []
    held_out = _documents(options, writers) if options.data is not None else []
    request_end = request_end_of(held_out)
    documents: list[str] = []
    if "docstrings" in tasks:
        block_size = min(writer.session.block_size for writer in writers)
        documents = spread_documents(held_out, options.texts, writers[0].tokenizer, block_size // 2)
    if "docstrings" in tasks and not documents:
        why = f"{options.data} has no held-out document with code in a fence behind a request that fits"
        if "docstrings" in options.task:
            raise UserError(f"{why}; leave --task docstrings out, or name a data set made of such pairs")
        say(f"docstrings are left out: {why}")
    for drawn in samplings:
        for writer in writers:
            if "requests" in tasks:
                found.append(answer_requests(writer, REQUESTS, drawn, longest, request_end))
                yield found[-1]
            if documents:
                found.append(answer_docstrings(writer, documents, drawn, longest))
                yield found[-1]
    stderr.print(table(ANSWERS, draws_of(found)).terminal())
    if options.page is not None:
        parts = [
            [row for row in found if row.prompts == asked]
            for asked in dict.fromkeys(r.prompts for r in found)
        ]
        write_atomic(options.page, "\n".join(samples_markdown(part) for part in parts))


def _samplings(options: EvaluateOptions) -> "list[Sampling]":
    """Return how prompts are answered: as often as is wanted at the temperature, and greedily."""
    from jaxgpt.generation.sampling import NO_PENALTY, Sampling

    first, seeds = _drawn(options), range(options.seed, options.seed + options.draws * APART, APART)
    drawn = [dataclasses.replace(first, seed=seed) for seed in seeds]
    penalties = {name: getattr(first, name) for name in NO_PENALTY}
    greedy = Sampling(0.0, seed=options.seed, **penalties)
    return ([] if options.temperature == 0 else drawn) + [greedy]


def _documents(options: EvaluateOptions, writers: Any) -> list[str]:
    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt_bench.quality.samples import val_documents

    assert options.data is not None
    dataset = open_dataset(options.data)
    if dataset.tokenizer_sha256 != writers[0].tokenizer.sha256:
        raise UserError(f"{options.data} was made with another tokenizer than {writers[0].name}")
    return val_documents(dataset.val, writers[0].tokenizer)


def _functions(options: EvaluateOptions, writers: Any) -> list[Any]:
    from jaxgpt_bench.evaluate.functions import held_out_functions

    documents, tokenizer = _documents(options, writers), writers[0].tokenizer
    block_size = min(writer.session.block_size for writer in writers)
    longest = options.tokens or LONGEST_LINES
    return held_out_functions(documents, tokenizer, block_size, longest, options.texts)


def _go_on(options: EvaluateOptions, writers: Any, functions: list[Any]) -> tuple[Any, ...]:
    from jaxgpt_bench.common.tables import table
    from jaxgpt_bench.evaluate.functions import evaluate_functions
    from jaxgpt_bench.evaluate.tables import FUNCTIONS

    rows = evaluate_functions(writers, functions, options.tokens or LONGEST_LINES)
    stderr.print(table(FUNCTIONS, rows).terminal())
    return tuple(rows)


def _check_problems(writers: Any, problems: Any) -> None:
    from jaxgpt_bench.evaluate.human_eval_task import fitting

    for writer in writers:
        fitting(writer, problems)


def _human_eval(options: EvaluateOptions, writers: Any, problems: Any) -> Iterator[Any]:
    from jaxgpt_bench.evaluate.human_eval_task import evaluate_human_eval
    from jaxgpt_bench.evaluate.tables import human_eval_table, human_eval_verdict

    longest = options.tokens or LONGEST_HUMAN_EVAL
    assert options.temperature is not None
    how = (options.samples, longest, options.temperature, options.top_p, options.seed)
    rows = []
    for row in evaluate_human_eval(writers, problems, *how):
        rows.append(row)
        yield row
    stderr.print(human_eval_table(rows).terminal())
    for line in human_eval_verdict(rows):
        say(line)
