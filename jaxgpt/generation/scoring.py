"""How likely a model finds tokens: one definition for texts that are scored and for those that are generated.

A token's log-probability is its logit minus logsumexp of the logits, in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.session import ScoringSession
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
    found = [np.zeros(0)]
    for start in range(0, len(tokens), ROWS):
        targets = tokens[start : start + ROWS]
        logits = session.forward(given[start : start + len(targets)], all_logits=True)
        found.append(logits[np.arange(len(targets)), targets] - log_sums(logits))
    return np.concatenate(found)


def score_rows(logits: npt.NDArray[np.float32], targets: Sequence[int], top: int) -> list[TokenScore]:
    """Score a token of each row of logits.

    Args:
      logits: (N, V).
      targets: (N,).
      top: the most likely tokens that are told beside each.
    """
    sums = log_sums(logits)
    scores = []
    for row, target, total in zip(logits, targets, sums, strict=True):
        best = most_likely(row, top)
        likely = [(int(token), float(row[token] - total)) for token in best]
        scores.append(TokenScore(float(row[target] - total), likely))
    return scores


def log_sums(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return logsumexp in float64 of each row of logits (N, V): (N,); UserError where one is not finite."""
    if not np.isfinite(logits).all():
        raise UserError("the model's logits hold NaN or infinity; its weights are damaged")
    exact = logits.astype(np.float64)
    largest = exact.max(axis=1, initial=-np.inf)
    sums: npt.NDArray[np.float64] = np.log(np.exp(exact - largest[:, None]).sum(axis=1)) + largest
    return sums


def most_likely(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return the places of the `count` largest of (V,), the largest first, the lower of equals first."""
    if not count:
        return np.zeros(0, np.int64)
    if count == 1:
        return np.array([np.argmax(row)])
    least = np.partition(row, -count)[-count] if count < len(row) else row.min()
    places = np.flatnonzero(row >= least)
    return places[np.argsort(-row[places], kind="stable")][:count]
