"""What keeps a text from repeating itself: logits changed by the tokens before them, as in transformers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.sampling import Sampling

LEAST_LOGIT = float(np.finfo(np.float32).min)  # of a token that is never drawn; logits stay finite


def changes_by_history(sampling: Sampling) -> bool:
    """Whether the tokens before one change its logits."""
    return sampling.repetition_penalty != 1.0 or sampling.no_repeat_ngram_size > 0


def penalize_repetition(
    logits: npt.NDArray[np.float32], tokens: Sequence[int], sampling: Sampling
) -> npt.NDArray[np.float32]:
    """Return logits (V,) as a text's history changes them: the one definition, for every engine.

    A token that stands in the text has its logit divided by repetition_penalty where that is positive, and
    multiplied where it is negative (Keskar et al., CTRL, https://arxiv.org/abs/1909.05858); one that would
    end a run of no_repeat_ngram_size tokens that stands in the text already is never drawn.

    Args:
      logits: (V,), of the next token; they stay as they are.
      tokens: the text, its prompt included, as transformers counts.
      sampling: says how.
    """
    changed = logits.copy()
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(tokens, np.int64))
        of_seen, penalty = logits[seen], np.float32(sampling.repetition_penalty)
        changed[seen] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    if sampling.no_repeat_ngram_size:
        changed[ends_of_ngrams(tokens, sampling.no_repeat_ngram_size)] = LEAST_LOGIT
    return changed


def ends_of_ngrams(tokens: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Return the tokens that have followed the last `size` - 1 tokens before, each as often as it did.

    Args:
      tokens: a text, at least one.
      size: of the run that such a token would repeat, at least 1.
    """
    text = np.asarray(tokens, np.int64)
    starts = len(text) - size + 1  # runs of `size` tokens that the text has
    if starts <= 0:
        return text[:0]
    same = np.ones(starts, bool)
    for place in range(size - 1):
        same &= text[place : place + starts] == text[place - size + 1]
    return text[size - 1 :][same]
