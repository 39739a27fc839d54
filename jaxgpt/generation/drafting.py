"""Decoding of one text that runs alone: several tokens a call, from drafts and in greedy runs."""

import itertools
import time
from collections.abc import Sequence

from jaxgpt.generation.prompt_lookup import PromptLookup
from jaxgpt.generation.sampling import Sampler, damaged_model
from jaxgpt.generation.session import RewindableSession
from jaxgpt.generation.state import GenerationState

TOKENS_PER_CALL = 8  # made by one call of a session: Python between two calls takes 45 us


class Drafting:
    """Advances a text by one call of its session: a draft that is verified, or a greedy run.

    Args:
      state: the text.
      draft_tokens: tokens to draft at most by prompt lookup; 0 drafts nothing.
    """

    def __init__(self, state: GenerationState, draft_tokens: int) -> None:
        self._state = state
        self._draft_tokens = draft_tokens
        self._lookup = PromptLookup(state.prompt, draft_tokens)
        self._seen = 0  # generated tokens that the lookup knows

    def advance(self, session: RewindableSession) -> list[tuple[int, str]]:
        """Take the text's last token and go on.

        Args:
          session: holds the prompt and all generated tokens but the last one.

        Returns:
          Each new token with the text that it completes.
        """
        state, lookup = self._state, self._lookup
        for known in state.tokens[self._seen :]:
            lookup.push(known)
        self._seen = len(state.tokens)
        token = state.tokens[-1]
        draft = lookup.draft(state.left - 1)
        started = time.perf_counter()
        if state.sampler.greedy and not draft:
            patience = lookup.patience if self._draft_tokens else TOKENS_PER_CALL
            most = min(state.left, TOKENS_PER_CALL, patience)
            drawn = session.decode_greedy(token, most, state.endoftext)
        else:
            drawn = _verify_draft(session, state.sampler, [token, *draft])
        accepted = min(len(drawn) - 1, len(draft))
        if accepted < len(draft):
            session.truncate(len(state.prompt) + len(state.tokens) + accepted)
        lookup.update(len(draft), accepted, time.perf_counter() - started, len(drawn))
        state.drafted += len(draft)
        state.accepted += accepted
        new = []
        for next_token in drawn:
            new.append((next_token, state.push(next_token)))
            if state.finished():
                break
        return new


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
        (token,) = session.draw(logits[None], [sampler.sampling], [sampler.next_uniform()])
        if token is None:
            raise damaged_model()
        drawn.append(token)
        if token != drafted:
            break
    return drawn
