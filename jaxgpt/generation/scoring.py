"""How likely a model finds a text that is given, token by token."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.session import ScoringSession
from jaxgpt.shared.errors import UserError

ROWS = 64  # whose logits exist at once: those of a long text with GPT-2's vocabulary would take 200 MB


def log_probabilities(session: ScoringSession, tokens: Sequence[int], before: int) -> npt.NDArray[np.float64]:
    """Return the log-probability of each token, given those before it.

    Args:
      session: the model; it forgets what it was given before.
      tokens: (N,), N at most the session's block_size.
      before: the token before the first one, <|endoftext|> at the start of a document.

    Returns:
      (N,), natural logarithms: logit minus logsumexp of the logits, in float64.

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
        logits = session.forward(given[start : start + len(targets)], all_logits=True).astype(np.float64)
        largest = logits.max(axis=1)
        total = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
        found.append(logits[np.arange(len(targets)), targets] - total)
    return np.concatenate(found)
