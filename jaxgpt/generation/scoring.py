"""How likely a model finds tokens: one definition for texts that are scored and for those that are generated.

A token's log-probability is its logit minus logsumexp of the logits, in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.sampling import Top, damaged_model, tops_in_numpy
from jaxgpt.generation.session import BatchSession, ScoringSession
from jaxgpt.shared.errors import UserError

ROWS = 64  # whose logits exist at once: those of a long text with GPT-2's vocabulary would take 200 MB


class TokenScore(NamedTuple):
    """How likely a token was in its place.

    Attributes:
      logprob: natural logarithm of its probability, at temperature 1.
      top: the most likely tokens there and their log-probabilities, the most likely first; the lower id of
        equals first.
    """

    logprob: float
    top: list[tuple[int, float]]


def log_probabilities(session: ScoringSession, tokens: Sequence[int], before: int) -> npt.NDArray[np.float64]:
    """Return the log-probability of each token, given those before it.

    Args:
      session: the model; it forgets what it was given before.
      tokens: (N,), N at most the session's block_size.
      before: the token before the first one, <|endoftext|> at the start of a document.

    Returns:
      (N,), natural logarithms.

    Raises:
      UserError: there are more tokens than the context holds.
    """
    if len(tokens) > session.block_size:
        raise UserError(
            f"the text has {len(tokens)} tokens, the model's context holds {session.block_size}; "
            "score it in pieces"
        )
    session.truncate(0)
    given = [before, *tokens[:-1]]
    found = []
    for start in range(0, len(tokens), ROWS):
        targets = tokens[start : start + ROWS]
        logits = session.forward(given[start : start + len(targets)], all_logits=True)
        tops = tops_of_rows(session, logits, 1)
        found += [score(*row, 0).logprob for row in zip(logits, tops, targets, strict=True)]
    return np.array(found)


def tops_of_rows(session: object, logits: npt.NDArray[np.float32], count: int) -> list[Top | None]:
    """Return the Top of each row of logits (M, V) at temperature 1, by the session where it can."""
    count = max(count, 1)
    if isinstance(session, BatchSession):
        return session.top(logits, [1.0] * len(logits), count) if len(logits) else []
    return tops_in_numpy(logits, [1.0] * len(logits), count)


def score(logits: npt.NDArray[np.float32], top: Top | None, target: int, count: int) -> TokenScore:
    """Score a token.

    Args:
      logits: (V,).
      top: of these logits at temperature 1; None where they are not finite.
      target: the token.
      count: the most likely tokens that are told beside it, at most as many as `top` has.

    Raises:
      UserError: the logits are not finite.
    """
    if top is None:
        raise damaged_model()
    log_sum = float(logits[top.ids[0]]) + math.log(top.total)
    likely = [(int(token), float(logits[token]) - log_sum) for token in top.ids[:count]]
    return TokenScore(float(logits[target]) - log_sum, likely)
