"""POST /v1/completions: what a base model is asked. docs/serving.md lists the fields."""

import dataclasses
import itertools
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from jaxgpt.generation.scheduling.scheduler import NewToken, Text
from jaxgpt.generation.scoring import TokenScore
from jaxgpt.generation.text_stream import TextStream
from jaxgpt.shared.tokenizer import Tokenizer

from jaxgpt_export.serve.api.answer import Asked, require_few
from jaxgpt_export.serve.api.api_error import ApiError
from jaxgpt_export.serve.api.request_fields import Fields
from jaxgpt_export.serve.api.token_names import special_name, token_name
from jaxgpt_export.serve.api.wishes import MOST_LOGPROBS, Prompt, count_prompts, read_prompts, read_wish
from jaxgpt_export.serve.served_model import ServedModel
from jaxgpt_export.serve.worker import Caller, Job, Update

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def complete(model: ServedModel, fields: Fields, caller: Caller) -> Asked:
    """Read what a request asks for.

    Raises:
      ApiError: a field is wrong.
    """
    fields.require_absent("suffix", "the model writes from left to right only")
    echo = fields.boolean("echo")
    wish = read_wish(fields, model, DEFAULT_MAX_TOKENS, least_tokens=0)
    if not wish.max_tokens and not echo:
        raise ApiError(
            400, "max_tokens is 0, which is for echo: true", param="max_tokens", code="invalid_value"
        )
    if fields.whole("best_of", wish.choices, 1, 128) != wish.choices:
        raise ApiError(
            400, "best_of is not supported, unless it equals n", param="best_of", code="unsupported_value"
        )
    logprobs = None
    if fields.get("logprobs") is not None and fields.get("logprobs") is not False:
        logprobs = fields.whole("logprobs", 0, 0, MOST_LOGPROBS)
    require_few(model, count_prompts(fields.get("prompt")) * wish.choices)  # before they are made
    prompts = read_prompts(fields.get("prompt"), model)
    texts = [
        wish.text(model, prompt, choice, logprobs=logprobs, echo=echo, caller=caller)
        for prompt in prompts
        for choice in range(wish.choices)
    ]
    reply = CompletionReply(model, prompts, wish.choices, echo, logprobs is not None, wish.include_usage)
    return Asked(texts, reply, wish.stream)


class CompletionReply:
    """The answer of /v1/completions; a `Reply`.

    Args:
      model: that answers.
      prompts: as they were given.
      choices: of each prompt.
      echo: the prompt is part of the text.
      logprobs: tokens are told with their log-probabilities.
      include_usage: a stream tells what it used at its end.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: list[Prompt],
        choices: int,
        echo: bool,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._choices = choices
        self._echo, self._logprobs, self._include_usage = echo, logprobs, include_usage
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._shown: dict[int, _Shown] = {}

    def whole(self, job: Job, updates: list[Update]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = []
        for place, (text, tokens) in enumerate(tokens_of(job, updates)):
            shown = self._begin(place)
            content = shown.prompt + "".join(token.text for token in tokens)
            logprobs = None
            if self._logprobs:
                before = shown.prompt_logprobs(text.prompt_scores) if self._echo else Logprobs()
                logprobs = before + shown.logprobs(tokens)
            choices.append(_choice(place, content, logprobs, finish_reason(text)))
        return {**self._head, "choices": choices, "usage": usage(job, self._choices)}

    def begin(self) -> list[dict[str, Any]]:
        """Nothing comes before the first token."""
        return []

    def events(self, job: Job, update: Update) -> list[dict[str, Any]]:
        """Return an event a token that has text, and one with the reason of the end."""
        place, text = update.place, job.texts[update.place]
        shown = self._shown.get(place)
        found = []
        if shown is None:
            shown = self._shown[place] = self._begin(place)
            if self._echo:
                scores = shown.prompt_logprobs(text.prompt_scores) if self._logprobs else None
                found.append(self._event(_choice(place, shown.prompt, scores, None)))
        for token in update.tokens:
            logprobs = shown.logprobs([token]) if self._logprobs else None
            if token.text or (logprobs and logprobs.tokens):
                found.append(self._event(_choice(place, token.text, logprobs, None)))
        if update.finished:
            found.append(self._event(_choice(place, "", None, finish_reason(text))))
        return found

    def end(self, job: Job) -> list[dict[str, Any]]:
        """Return what was used, if that was asked for."""
        return (
            [{**self._head, "choices": [], "usage": usage(job, self._choices)}] if self._include_usage else []
        )

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice], **({"usage": None} if self._include_usage else {})}

    def _begin(self, place: int) -> "_Shown":
        return _Shown(self._model.tokenizer, self._prompts[place // self._choices], self._echo)


class _Shown:
    """How far a choice was told.

    Args:
      tokenizer: of the model.
      prompt: of the choice.
      echo: its text begins with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, echo: bool) -> None:
        self.prompt = prompt.text if echo else ""
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt.tokens
        self._was_text = prompt.was_text
        self._offset = len(prompt.text)  # of the next token in prompt and text
        self._written = TextStream(tokenizer)  # what is held back for a stop text counts, too

    def prompt_logprobs(self, scores: list[TokenScore]) -> "Logprobs":
        """Return the log-probabilities of the prompt's tokens; the first one has none.

        Raises:
          ApiError: the text's time ended before all were scored.
        """
        if len(scores) + 1 < len(self._prompt_tokens):
            raise ApiError(
                503,
                f"the time was over when {len(scores)} of the prompt's {len(self._prompt_tokens) - 1} tokens "
                "were scored; ask for fewer at once, or raise --max-seconds",
                code="time_over",
            )
        found, stream, offset = Logprobs(), TextStream(self._tokenizer), 0
        for token, score in zip(self._prompt_tokens, [None, *scores], strict=True):
            found.add(self._tokenizer, token, score, offset)
            written = special_name(self._tokenizer, token) if self._was_text else None
            offset += len(written or stream.push(token))
        return found

    def logprobs(self, tokens: list[NewToken]) -> "Logprobs":
        """Return the log-probabilities of new tokens."""
        found = Logprobs()
        for token, _, score in tokens:
            if token >= 0:
                found.add(self._tokenizer, token, score, self._offset)
                self._offset += len(self._written.push(token))
        return found


@dataclasses.dataclass
class Logprobs:
    """The logprobs of a choice.

    Attributes:
      tokens: their names.
      token_logprobs: of each; None for the first one of a text.
      top_logprobs: name -> log-probability of the most likely tokens and of the token itself.
      text_offset: where each begins.
    """

    tokens: list[str] = dataclasses.field(default_factory=list)
    token_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = dataclasses.field(default_factory=list)
    text_offset: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokenizer: Tokenizer, token: int, score: TokenScore | None, offset: int) -> None:
        """Take a token."""
        name = token_name(tokenizer, token)
        self.tokens.append(name)
        self.text_offset.append(offset)
        self.token_logprobs.append(None if score is None else score.logprob)
        if score is None:
            self.top_logprobs.append(None)
        else:
            top = {token_name(tokenizer, other): logprob for other, logprob in score.top}
            self.top_logprobs.append(top | {name: score.logprob})

    def __add__(self, other: "Logprobs") -> "Logprobs":
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Logprobs(*(ours + theirs for ours, theirs in parts))


def _choice(index: int, text: str, logprobs: Logprobs | None, reason: str | None) -> dict[str, Any]:
    told = None if logprobs is None else dict(vars(logprobs))
    return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def tokens_of(job: Job, updates: Iterable[Update]) -> Iterator[tuple[Text, list[NewToken]]]:
    """Yield each text of a job with its tokens, from all updates."""
    found: list[list[NewToken]] = [[] for _ in job.texts]
    for update in updates:
        found[update.place] += update.tokens
    yield from zip(job.texts, found, strict=True)


def finish_reason(text: Text) -> str:
    """Return why a text ended, in the API's words: stop or length."""
    return "stop" if text.state.finish_reason in ("stop", "endoftext") else "length"


def usage(job: Job, choices: int) -> dict[str, Any]:
    """Count tokens: each prompt once, however many choices it has."""
    first = list(itertools.islice(job.texts, 0, None, choices))
    prompt = sum(len(text.state.prompt) for text in first)
    made = sum(len(text.state.tokens) for text in job.texts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(text.cached for text in first)},
    }
