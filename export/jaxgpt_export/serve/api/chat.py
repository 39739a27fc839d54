"""POST /v1/chat/completions, for models that come with a chat template; others answer 400."""

import time
import uuid
from typing import Any

from jaxgpt.generation.scheduling.scheduler import NewToken
from jaxgpt.generation.scoring import TokenScore
from jaxgpt.shared.errors import UserError

from jaxgpt_export.serve.api.answer import Asked, require_few
from jaxgpt_export.serve.api.api_error import ApiError, bad_value
from jaxgpt_export.serve.api.completions import finish_reason, tokens_of, usage
from jaxgpt_export.serve.api.request_fields import Fields, valid_text
from jaxgpt_export.serve.api.token_names import begin_and_end, token_name
from jaxgpt_export.serve.api.wishes import MOST_LOGPROBS, MOST_TOKENS, read_wish, text_prompt
from jaxgpt_export.serve.chat_template import ChatTemplate
from jaxgpt_export.serve.served_model import ServedModel
from jaxgpt_export.serve.worker import Caller, Job, Update


def chat(model: ServedModel, fields: Fields, caller: Caller) -> Asked:
    """Read what a request asks for.

    Raises:
      ApiError: the model has no chat template, or a field is wrong.
    """
    template = model.chat_template
    if template is None:
        raise ApiError(
            400,
            f"model {model.name} is a base model without a chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    wants_text = fields.get("response_format") == {"type": "text"}
    for name in ("tools", "functions", *(() if wants_text else ("response_format",))):
        fields.require_absent(name, "the model writes plain text")
    messages = _read_messages(fields.get("messages"))
    wish = read_wish(fields, model, MOST_TOKENS, least_tokens=1)
    require_few(model, wish.choices)  # before they are made
    logprobs: int | None = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if not fields.boolean("logprobs"):
        if logprobs:
            raise ApiError(
                400, "top_logprobs is for logprobs: true", param="top_logprobs", code="invalid_value"
            )
        logprobs = None
    prompt = text_prompt(_render(model, template, messages), model, "messages")
    settings: dict[str, Any] = {"logprobs": logprobs, "echo": False, "caller": caller}
    texts = [wish.text(model, prompt, choice, **settings) for choice in range(wish.choices)]
    return Asked(texts, ChatReply(model, logprobs is not None, wish.include_usage), wish.stream)


def _read_messages(value: object) -> list[dict[str, str]]:
    expected = 'a list of {"role": "user", "content": "..."}'
    if not isinstance(value, list) or not value:
        raise bad_value("messages", value, expected)
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_value("messages", message, expected)
        content = message.get("content")
        if isinstance(content, list):  # parts
            texts = [
                part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
            ]
            if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
                raise bad_value("messages", message, "parts of text")
            content = "".join(str(text) for text in texts)
        if not isinstance(content, str):
            raise bad_value("messages", message, expected)
        messages.append({**message, "content": valid_text("messages", content)})
    return messages


def _render(model: ServedModel, template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    try:
        return valid_text("messages", template.render(messages, *begin_and_end(model.tokenizer)))
    except UserError as error:
        raise ApiError(400, str(error), param="messages", code="template_error") from None


class ChatReply:
    """The answer of /v1/chat/completions; a `Reply`."""

    def __init__(self, model: ServedModel, logprobs: bool, include_usage: bool) -> None:
        self._model, self._logprobs, self._include_usage = model, logprobs, include_usage
        self._id = {"id": f"chatcmpl-{uuid.uuid4().hex}"}
        self._rest = {"created": int(time.time()), "model": model.name}
        self._begun: set[int] = set()

    def whole(self, job: Job, updates: list[Update]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = []
        for place, (text, tokens) in enumerate(tokens_of(job, updates)):
            message = {"role": "assistant", "content": "".join(token.text for token in tokens)}
            choice = {"index": place, "message": message, "logprobs": self._told(tokens)}
            choices.append({**choice, "finish_reason": finish_reason(text)})
        head = {**self._id, "object": "chat.completion", **self._rest}
        return {**head, "choices": choices, "usage": usage(job, len(job.texts))}

    def begin(self) -> list[dict[str, Any]]:
        """Nothing comes before the first token."""
        return []

    def events(self, job: Job, update: Update) -> list[dict[str, Any]]:
        """Return an event with the role first, then one a token that has text, then the reason of the end."""
        found = []
        if update.place not in self._begun:
            self._begun.add(update.place)
            found.append(self._event(update.place, {"role": "assistant", "content": ""}, None, None))
        found += [
            self._event(update.place, {"content": token.text}, self._told([token]), None)
            for token in update.tokens
            if token.text or (self._logprobs and token.token >= 0)
        ]
        if update.finished:
            found.append(self._event(update.place, {}, None, finish_reason(job.texts[update.place])))
        return found

    def end(self, job: Job) -> list[dict[str, Any]]:
        """Return what was used, if that was asked for."""
        if not self._include_usage:
            return []
        return [{**self._head(), "choices": [], "usage": usage(job, len(job.texts))}]

    def _head(self) -> dict[str, Any]:
        return {**self._id, "object": "chat.completion.chunk", **self._rest}

    def _event(
        self, place: int, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(), "choices": [choice], **({"usage": None} if self._include_usage else {})}

    def _told(self, tokens: list[NewToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._scored(token.token, token.score) for token in tokens if token.score]}

    def _scored(self, token: int, score: TokenScore) -> dict[str, Any]:
        top = [self._named(other, logprob) for other, logprob in score.top]
        return {**self._named(token, score.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        content = list(self._model.tokenizer.token_bytes(token))
        return {"token": token_name(self._model.tokenizer, token), "logprob": logprob, "bytes": content}
