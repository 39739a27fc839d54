"""One text from any session, and the options of every command that continues a prompt."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from jaxgpt.generation.prompt_lookup import PromptLookup
from jaxgpt.generation.sampling import Sampler, Sampling
from jaxgpt.generation.session import RewindableSession, Session
from jaxgpt.generation.state import Generation, GenerationState
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

TOKENS_PER_CALL = 8  # made by one call of a session: Python between two calls takes 45 us
DRAFT_TOKENS = 8  # drafted at most by prompt lookup, unless told otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every command that continues a prompt takes.

    Attributes:
      prompt: text to continue; an empty one starts a new document, - reads it from stdin.
      max_new_tokens: tokens to generate at most.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p.
      seed: of the random numbers.
      stop: texts that end the generation and are not shown.
      json: print one JSON document with text and figures on stdout instead of the text.
    """

    prompt: str | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json: bool = False

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; UserError for a value outside its range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

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
    session: Session, tokenizer: Tokenizer, options: PromptOptions, prompt: str, draft_tokens: int = 0
) -> Generation:
    """Continue a prompt as a command does: the text streams to stdout, unless that is kept for JSON.

    Args:
      session: the model.
      tokenizer: of the model.
      options: what the command was told.
      prompt: options.prompt_text(), or what was asked for instead.
      draft_tokens: see `generate`.
    """

    def show(text: str) -> None:
        if not options.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    arguments = (prompt, options.max_new_tokens, options.sampling(), options.stop, show)
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
    state.push(state.sampler.draw(session.prefill(state.prompt)))
    yield
    if isinstance(session, RewindableSession):
        yield from _decode_with_drafts(session, state, draft_tokens)
        return
    while not state.finished():
        state.push(state.sampler.draw(session.decode(state.tokens[-1])))
        yield


def _decode_with_drafts(
    session: RewindableSession, state: GenerationState, draft_tokens: int
) -> Iterator[None]:
    """Decode to the end, several tokens a call: drafts from the text itself, and greedy runs."""
    lookup = PromptLookup(state.prompt, draft_tokens)
    while not state.finished():
        token = state.tokens[-1]
        lookup.push(token)
        draft = lookup.draft(state.left - 1)
        started = time.perf_counter()
        if state.sampler.greedy and not draft:
            patience = lookup.patience if draft_tokens else TOKENS_PER_CALL
            most = min(state.left, TOKENS_PER_CALL, patience)
            drawn = session.decode_greedy(token, most, state.endoftext)
        else:
            drawn = _verify_draft(session, state.sampler, [token, *draft])
        accepted = min(len(drawn) - 1, len(draft))
        if accepted < len(draft):
            session.truncate(len(state.prompt) + len(state.tokens) + accepted)
        lookup.update(len(draft), accepted, time.perf_counter() - started, len(drawn))
        state.drafted, state.accepted = lookup.drafted, lookup.accepted
        for place, next_token in enumerate(drawn):
            if place:
                lookup.push(drawn[place - 1])
            state.push(next_token)
            if state.finished():
                break
        yield


def _verify_draft(session: RewindableSession, sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    """Take a token and the draft behind it; return the draft tokens that are accepted and the one after them.

    Each token is drawn from the logits that it would be drawn from without a draft, with a random number of
    its own.
    """
    all_logits = len(tokens) > 1
    if sampler.greedy:
        choices: Sequence[int] = session.greedy(tokens, all_logits=all_logits).tolist()
        right = (a == b for a, b in zip(choices, tokens[1:], strict=False))
        return list(choices[: 1 + sum(itertools.takewhile(bool, right))])
    drawn: list[int] = []
    for logits, drafted in itertools.zip_longest(session.forward(tokens, all_logits=all_logits), tokens[1:]):
        drawn.append(sampler.draw(logits))
        if drawn[-1] != drafted:
            break
    return drawn
