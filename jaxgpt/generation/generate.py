"""One text from any session, and the options of every command that continues a prompt."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxgpt.generation.sampling import DEFAULTS, NO_PENALTY, Sampling, choose_sampling
from jaxgpt.generation.scheduling.scheduler import Scheduler, Text
from jaxgpt.generation.session import BatchSession, Session
from jaxgpt.generation.state import Generation, GenerationState
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

DRAFT_TOKENS = 8  # drafted at most by prompt lookup, unless told otherwise
SIDE_BY_SIDE = 8  # texts of a list that are generated at once, unless told otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every command that continues a prompt takes.

    Attributes:
      prompt: text to continue; an empty one starts a new document, - reads it from stdin.
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits; 0 takes the most probable token. If not given 0.8, or what an
        artifact's generation_config.json says; so the next five.
      top_k: keep the k most probable tokens; 0 keeps all. If not given 0.
      top_p: keep the fewest tokens whose probabilities reach p. If not given 1.
      min_p: keep the tokens that are at least so probable as the most probable one times this; 0 keeps all.
        If not given 0.05.
      repetition_penalty: divides the positive logits of tokens that the text has, its prompt included, and
        multiplies the negative ones. If not given 1 (none).
      no_repeat_ngram_size: no run of so many tokens comes twice, the prompt's included. If not given 0 (any
        may).
      seed: of the random numbers.
      stop: texts that end the generation and are not shown.
      json: print one JSON document with text and figures on stdout instead of the text.
    """

    prompt: str | None = None
    max_new_tokens: int = 200
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    json: bool = False

    def sampling(self, model: Mapping[str, int | float]) -> Sampling:
        """Return how tokens are drawn from a model; see `choose_sampling`."""
        asked = {name: getattr(self, name) for name in (*DEFAULTS, *NO_PENALTY)}
        return choose_sampling(model, self.seed, **asked)

    def prompt_text(self) -> str:
        """Return the prompt, read from stdin for "-"; UserError when that is not UTF-8."""
        if self.prompt != "-":
            return self.prompt or ""
        if sys.stdin is None:
            raise UserError(
                "--prompt - reads stdin, which is closed; give the prompt itself, or a file: < FILE"
            )
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 ({error}); convert it first") from None


def generate_shown(
    session: Session,
    tokenizer: Tokenizer,
    options: PromptOptions,
    prompt: str,
    sampling: Sampling,
    draft_tokens: int = 0,
) -> Generation:
    """Continue a prompt as a command does: the text streams to stdout, unless that is kept for JSON.

    Args:
      session: the model.
      tokenizer: of the model.
      options: what the command was told.
      prompt: options.prompt_text(), or what was asked for instead.
      sampling: options.sampling(...) of the model.
      draft_tokens: see `generate`.
    """

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    arguments = (prompt, options.max_new_tokens, sampling, options.stop, show)
    done = generate(session, tokenizer, *arguments, draft_tokens)
    show("\n")
    return done


def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    draft_tokens: int = 0,
) -> Generation:
    """Continue a prompt.

    Args:
      session: the model.
      tokenizer: as the next ones, see GenerationState.
      prompt: see GenerationState.
      max_new_tokens: see GenerationState.
      sampling: see GenerationState.
      stop: see GenerationState.
      on_text: see GenerationState.
      draft_tokens: tokens to draft at most by prompt lookup, where the session can rewind; the text is the
        same.

    Raises:
      UserError: the prompt leaves no room for a token, or max_new_tokens is below 1.
    """
    state = GenerationState(tokenizer, prompt, session.block_size, max_new_tokens, sampling, stop, on_text)
    for _ in decode_steps(session, state, draft_tokens):
        pass
    return state.result()


def decode_steps(session: Session, state: GenerationState, draft_tokens: int = 0) -> Iterator[None]:
    """Advance a text to its end, one call of the session a step.

    Args:
      session: the model; it forgets what it was given before.
      state: the text; nothing was pushed yet.
      draft_tokens: see `generate`.

    Yields:
      After each call of the session, when its tokens were pushed.
    """
    if isinstance(session, BatchSession):
        scheduler = Scheduler(session)
        text = Text(state, draft_tokens=draft_tokens)
        scheduler.submit(text)
        while not state.finished():
            scheduler.step()
            _raise_error(text)
            yield
        return
    state.push(state.sampler.draw(state.penalized(session.prefill(state.prompt))))
    yield
    while not state.finished():
        state.push(state.sampler.draw(state.penalized(session.decode(state.tokens[-1]))))
        yield


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what is asked for.

    Attributes:
      prompt: text to continue.
      max_new_tokens: tokens to generate at most.
      sampling: how they are drawn.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling


def generate_many(
    session: Session, tokenizer: Tokenizer, requests: Sequence[Request], stop: Sequence[str] = ()
) -> Iterator[tuple[int, Generation]]:
    """Generate texts, as many side by side as the session has slots; one after the other without slots.

    Yields:
      The place of a request and its text, in the order in which they end.

    Raises:
      UserError: a prompt leaves no room for a token.
    """
    if not isinstance(session, BatchSession):
        for index, request in enumerate(requests):
            arguments = (request.prompt, request.max_new_tokens, request.sampling, stop)
            yield index, generate(session, tokenizer, *arguments)
        return
    scheduler = Scheduler(session)
    places = {}
    for index, request in enumerate(requests):
        wish = (request.max_new_tokens, request.sampling, stop)
        text = Text(GenerationState(tokenizer, request.prompt, session.block_size, *wish))
        places[text] = index
        scheduler.submit(text)
    while scheduler.busy:
        for text in scheduler.step():
            _raise_error(text)
            if text.finished:
                yield places[text], text.state.result()


def _raise_error(text: Text) -> None:
    if text.error is not None:
        raise text.error
