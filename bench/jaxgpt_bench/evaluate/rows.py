"""What `jaxgpt-bench evaluate` measures, typed, as it is written as JSON."""

import dataclasses
from typing import Any

from jaxgpt.data.requests.repetition import most_repeated, words_of
from jaxgpt_bench.common.json_data import LEFT_OUT, JsonData
from jaxgpt_bench.common.rows import Provenance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(JsonData):
    """A figure, and what lies between it and the first model's on the same texts.

    Attributes:
      value: mean over the texts.
      error: its standard error; None for one text.
      difference: from the first model's; None for the first.
      difference_error: standard error of the paired difference.
    """

    value: float
    error: float | None
    difference: float | None = None
    difference_error: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(JsonData):
    """How fast all texts were written, side by side.

    Attributes:
      tokens_per_s: of all of them.
      characters_per_s: of all of them; models of different tokenizers share it.
    """

    tokens_per_s: float
    characters_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(JsonData):
    """What a model wrote for a request.

    Attributes:
      prompt: the request.
      text: what follows it.
      finish_reason: endoftext, stop, length or context.
      parses: its code is Python.
      function: the first function whose name fits the request; "" for none. Of held-out functions, their own.
      passed: the function passes the request's check; None where there is none.
      why: "passed", or how the check ended; files of earlier versions have an exception's text too.
      most_repeated: how often the most frequent run of four tokens occurs. A long name may be four tokens
        of a small vocabulary.
    """

    prompt: str
    text: str
    finish_reason: str
    parses: bool
    function: str
    passed: bool | None
    why: str
    most_repeated: int

    @property
    def most_repeated_words(self) -> int:
        """How often the most frequent run of four words occurs, whatever the vocabulary."""
        return most_repeated(words_of(self.text))

    @property
    def fits(self) -> bool:
        """Whether it is a program with a function whose name fits."""
        return self.parses and self.function != ""

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason in ("endoftext", "stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersRow(JsonData):
    """A model's answers to one list of prompts, drawn once.

    Attributes:
      model: its folder.
      kind: of its artifact.
      prompts: which list.
      temperature: 0 is greedy.
      min_p: as `generate` has it; nothing is cut off a greedy choice.
      top_k: as min_p.
      top_p: as min_p.
      seed: of the first prompt's random numbers; the others' follow.
      repetition_penalty: as `generate` has it, of a greedy choice too; None for none.
      no_repeat_ngram_size: as repetition_penalty.
      weights_sha256: of the artifact's model.safetensors; files of earlier versions have none.
      answers: one a prompt.
      speed: of writing.
    """

    model: str
    kind: str
    prompts: str
    temperature: float
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    no_repeat_ngram_size: int | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    weights_sha256: str | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    answers: tuple[Answer, ...]
    speed: Speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionsRow(JsonData):
    """How a model goes on with held-out functions, greedily, from the middle of their code.

    Attributes:
      model: its folder.
      kind: of its artifact.
      next_line: share whose next line is exactly the function's.
      edit_similarity: of the next line to the function's, 1 for the same.
      parses: share whose code, begun by the function's own, is Python.
      repeats: share in which a run of four tokens occurs more than five times.
      bits_per_byte: of the whole documents.
      speed: of writing.
    """

    model: str
    kind: str
    next_line: Measured
    edit_similarity: Measured
    parses: Measured
    repeats: Measured
    bits_per_byte: Measured
    speed: Speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassAt(JsonData):
    """pass@k over all problems; smallest_shown is the difference that it could have shown."""

    k: int
    score: Measured
    smallest_shown: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanEvalRow(JsonData):
    """A model's programs for HumanEval's problems.

    Attributes:
      model: its folder.
      kind: of its artifact.
      samples: a problem.
      pass_at: by k.
      passed: programs that passed, by problem.
      ends: how programs ended, counted; those of problems that the context does not hold among them.
      speed: of writing.
    """

    model: str
    kind: str
    samples: int
    pass_at: tuple[PassAt, ...]
    passed: dict[str, int]
    ends: dict[str, int]
    speed: Speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFigures(Provenance):
    """All of it; a task that was left out has no rows.

    Attributes:
      answers: to requests and held-out docstrings.
      functions: held-out ones.
      human_eval: HumanEval.
      settings: how texts were written.
      unfinished: of these, what was not done when this was written; None at the end.
    """

    answers: tuple[AnswersRow, ...] = ()
    functions: tuple[FunctionsRow, ...] = ()
    human_eval: tuple[HumanEvalRow, ...] = ()
    settings: dict[str, Any]
    unfinished: tuple[str, ...] | None = dataclasses.field(default=None, metadata=LEFT_OUT)
