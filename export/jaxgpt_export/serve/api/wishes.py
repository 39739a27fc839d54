"""From the fields of a request to texts for the scheduler."""

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import NamedTuple

from jaxgpt.generation.sampling import LARGEST_PENALTY, LEAST_PENALTY, MOST_PROBABLE, Sampling
from jaxgpt.generation.scheduling.logit_rules import LogitRules
from jaxgpt.generation.scheduling.scheduler import Text
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.errors import UserError

from jaxgpt_export.serve.api.api_error import ApiError, bad_value
from jaxgpt_export.serve.api.request_fields import Fields, valid_text
from jaxgpt_export.serve.served_model import ServedModel
from jaxgpt_export.serve.worker import Caller

MOST_STOPS = 64  # OpenAI takes 4; evaluation harnesses send more
MOST_CHOICES = 128
MOST_LOGPROBS = 20
RANDOM_SEED = -1  # as if there were none, as in other servers
MOST_DIGITS = 10  # of a token's id
MOST_TOKENS = 2**31 - 1  # what is asked for is cut to what the context leaves


@dataclasses.dataclass(frozen=True)
class Wish:
    """How texts are to be generated, whatever the route.

    Attributes:
      max_tokens: to generate at most.
      sampling: of all choices, but for their seeds.
      seed: of each prompt's first choice, the others' follow from it; None: every text has a random one.
      choices: texts of each prompt.
      stop: texts that end a choice.
      rules: of the logits.
      stream: send tokens as they come.
      include_usage: of a stream, at its end.
    """

    max_tokens: int
    sampling: Sampling
    seed: int | None
    choices: int
    stop: tuple[str, ...]
    rules: LogitRules
    stream: bool
    include_usage: bool

    def text(
        self,
        model: ServedModel,
        prompt: "Prompt",
        choice: int,
        *,
        logprobs: int | None,
        echo: bool,
        caller: Caller,
    ) -> Text:
        """Return one choice of a prompt for the scheduler; ApiError where the prompt is too long."""
        seed = secrets.randbits(64) if self.seed is None else seed_of_choice(self.seed, choice)
        sampling = dataclasses.replace(self.sampling, seed=seed)
        settings = (prompt.tokens, model.block_size, self.max_tokens, sampling, self.stop)
        try:
            state = GenerationState(model.tokenizer, *settings, least_tokens=0)
        except UserError as error:
            code = "context_length_exceeded"
            raise ApiError(400, str(error), param=prompt.field, code=code) from None
        return Text(
            state,
            draft_tokens=model.draft_tokens,
            logprobs=logprobs,
            score_prompt=echo and logprobs is not None,
            rules=self.rules,
            owner=caller.owner,
            deadline=time.monotonic() + caller.seconds if caller.seconds else float("inf"),
        )


def read_wish(fields: Fields, model: ServedModel, default_max_tokens: int, least_tokens: int) -> Wish:
    """Read what the routes have in common.

    Args:
      fields: of the request.
      model: that is asked.
      default_max_tokens: where there is no max_tokens.
      least_tokens: that max_tokens may be.

    Raises:
      ApiError: a field is wrong.
    """
    choices = fields.whole("n", 1, 1, MOST_CHOICES)
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    seed = fields.whole("seed", RANDOM_SEED, -(2**63), 2**64 - 1)
    stream = fields.boolean("stream")
    options = fields.section("stream_options")
    if fields.get("stream_options") is not None and not stream:
        raise ApiError(
            400, "stream_options are for stream: true", param="stream_options", code="invalid_value"
        )
    return Wish(
        fields.whole(name, default_max_tokens, least_tokens, MOST_TOKENS),
        _sampling(fields, model.generation),
        None if seed == RANDOM_SEED else seed % 2**64,
        choices,
        fields.texts("stop", MOST_STOPS),
        LogitRules(
            _bias(fields, model.tokenizer.vocab_size),
            fields.number("presence_penalty", 0.0, -2.0, 2.0),
            fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        ),
        stream,
        stream and options.boolean("include_usage"),
    )


def _sampling(fields: Fields, said: Mapping[str, int | float]) -> Sampling:
    """Read how tokens are drawn; what is not in the request is as the model says, else as OpenAI has it."""
    top_k = fields.whole("top_k", int(said.get("top_k", 0)), -1, MOST_TOKENS)
    top_p = fields.number("top_p", said.get("top_p", 1.0), 0.0, 1.0)
    return Sampling(
        temperature=fields.number("temperature", said.get("temperature", 1.0), 0.0, 100.0),
        top_k=max(top_k, 0),  # -1 is all, as in other servers
        top_p=top_p or MOST_PROBABLE,  # 0, as others write it
        min_p=fields.number("min_p", said.get("min_p", 0.0), 0.0, 1.0),
        repetition_penalty=fields.number(
            "repetition_penalty", said.get("repetition_penalty", 1.0), LEAST_PENALTY, LARGEST_PENALTY
        ),
        no_repeat_ngram_size=fields.whole(
            "no_repeat_ngram_size", int(said.get("no_repeat_ngram_size", 0)), 0, MOST_TOKENS
        ),
    )


def _bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    bias = {}
    values = fields.section("logit_bias")
    for name in values.names():
        is_number = name.isascii() and name.isdigit() and len(name) < MOST_DIGITS
        if not is_number or int(name) >= vocab_size:
            raise bad_value("logit_bias", name, f"ids of tokens, 0 to {vocab_size - 1}, as names")
        try:
            bias[int(name)] = values.number(name, 0.0, -100.0, 100.0)
        except ApiError:
            expected = f"a number from -100 to 100 for token {name}"
            raise bad_value("logit_bias", values.get(name), expected) from None
    return bias


def seed_of_choice(seed: int, choice: int) -> int:
    """Return the seed of one of several choices: the first has the request's own."""
    if not choice:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "little")


class Prompt(NamedTuple):
    """A prompt as text and as tokens.

    Attributes:
      text: as it was given, or what the tokens say: nothing where one is <|endoftext|>.
      tokens: at least one.
      was_text: it was given as text, in which special tokens are written out.
      field: of the request that it comes from.
    """

    text: str
    tokens: list[int]
    was_text: bool = False
    field: str = "prompt"


def count_prompts(value: object) -> int:
    """Return how many prompts there are in what `read_prompts` reads, as far as it is well formed."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], str | list) else 1


def read_prompts(value: object, model: ServedModel) -> list[Prompt]:
    """Read a prompt in its four forms: a text, texts, tokens, lists of tokens.

    An empty text begins a new document.

    Raises:
      ApiError: it is in none of them, or too long for the model.
    """
    tokenizer = model.tokenizer
    expected = "a text, a list of texts, a list of tokens, or a list of lists of tokens"
    if value is None:
        raise ApiError(400, f"prompt is missing, expected {expected}", param="prompt", code="missing_value")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise bad_value("prompt", value, expected)
    if all(isinstance(item, str) for item in value):
        return [text_prompt(valid_text("prompt", text), model) for text in value]
    lists = value if all(isinstance(item, list) for item in value) else [value]
    for tokens in lists:
        if not tokens or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
            raise bad_value("prompt", value, expected)
        beyond = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
        if beyond:
            raise bad_value("prompt", beyond[0], f"tokens from 0 to {tokenizer.vocab_size - 1}")
    return [Prompt(tokenizer.decode(tokens), tokens) for tokens in lists]


def text_prompt(text: str, model: ServedModel, field: str = "prompt") -> Prompt:
    """Return a text as a prompt; ApiError where it is so long that it can't fit, whatever its tokens."""
    tokenizer, size = model.tokenizer, len(text.encode())
    longest = tokenizer.longest_token
    if longest is not None and size > longest * model.block_size:
        raise ApiError(
            400,
            f"the prompt has {size} bytes, the model's context holds {model.block_size} tokens of at most "
            f"{longest} bytes; shorten the prompt",
            param=field,
            code="context_length_exceeded",
        )
    tokens = tokenizer.encode(text, special=True) or [tokenizer.endoftext]
    return Prompt(text, tokens, was_text=True, field=field)
