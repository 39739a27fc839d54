"""Prompt lookup: drafts the next tokens from an earlier place where the text went the same way.

Code repeats itself. A session whose time goes into reading the weights takes four tokens in little more than
the time of one, so the tokens that once followed the same few tokens are tried, all in one step. The session
says what it would have drawn after each; the draft is accepted as far as it agrees, and the text is exactly
the one without drafts.

Source: Saxena 2023, prompt lookup decoding; Leviathan et al. 2023, arXiv:2211.17192, for the principle.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must have gone the same way
FIRST_LENGTH = 3
ALLOWED_LOSS = 0.03  # share of the time spent so far that drafts may cost more than they bring
SMOOTHING = 0.9  # weight of the old mean when the time of a step without a draft is averaged in


class PromptLookup:
    """Drafts for one text.

    The length of a draft doubles when all of it was accepted and halves when less than half was. What drafts
    cost and brought is booked in seconds, and while the account is overdrawn by ALLOWED_LOSS of all time
    spent, nothing is drafted: whatever the text, the loss stays bounded.

    Args:
      tokens: the prompt.
      max_tokens: tokens of a draft at most.

    Attributes:
      patience: tokens worth decoding before the next draft is asked for: one after a draft that was accepted,
        twice as many each time that there was none. A session that decodes several in one call is faster.
      drafted: draft tokens that were tried.
      accepted: how many of them were accepted.
    """

    def __init__(self, tokens: Sequence[int], max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = min(FIRST_LENGTH, max_tokens)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens -> the place after them
        self._plain_s = 0.0
        self._spent_s = 0.0
        self._account_s = 0.0
        self.patience = 1
        self.drafted = 0
        self.accepted = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the text's next token."""
        place = len(self._tokens)
        for n in range(SHORTEST, LONGEST + 1):
            if n <= place:
                self._after[tuple(self._tokens[place - n :])] = place
        self._tokens.append(token)

    def draft(self, room: int) -> list[int]:
        """Return the tokens that may come next, at most `room`; often none."""
        overdrawn = self._account_s < -ALLOWED_LOSS * self._spent_s
        if room < 1 or overdrawn or not self._plain_s:
            return []
        for n in range(LONGEST, SHORTEST - 1, -1):
            place = self._after.get(tuple(self._tokens[-n:])) if n <= len(self._tokens) else None
            if place is not None:
                return self._tokens[place : place + min(self._length, room)]
        return []

    def update(self, drafted: int, accepted: int, seconds: float, made: int = 1) -> None:
        """Take in what a step gave.

        Args:
          drafted: draft tokens that were tried.
          accepted: how many of them were accepted.
          seconds: the whole step took.
          made: tokens that the session decoded by itself in a step without a draft.
        """
        self._spent_s += seconds
        if not drafted:
            each = seconds / made
            self._plain_s = SMOOTHING * self._plain_s + (1 - SMOOTHING) * each if self._plain_s else each
            self.patience *= 2
            return
        self.patience = 1 if accepted else 2
        self.drafted += drafted
        self.accepted += accepted
        self._account_s += (accepted + 1) * self._plain_s - seconds
        if accepted == drafted:
            self._length = min(2 * self._length, self._max_tokens)
        elif 2 * accepted < drafted:
            self._length = max(self._length // 2, 1)
