"""Prompt lookup: guesses the next tokens from an earlier place where the text went the same way.

Code repeats itself, and a memory-bound engine takes four tokens in little more than the time of one: so
tokens that followed the same few tokens before are tried, all in one step. The engine says what it would have
drawn after each; the guesses that agree stand, and the text is exactly the one without guessing.

Source: Saxena 2023, prompt lookup decoding; Leviathan et al. 2023, arXiv:2211.17192, for the principle.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must have gone the same way
FIRST_LENGTH = 3
ALLOWED_LOSS = 0.03  # of the time spent so far: guesses that cost more than they bring stop there
KEPT = 0.9  # of the measured time of a step without guesses, as the next one is averaged in


class PromptLookup:
    """Guesses for one text.

    The length of a guess doubles when all of it stood and halves when less than half did. What guessing cost
    and brought is booked in seconds, and while the account is overdrawn by ALLOWED_LOSS of all time spent,
    nothing is guessed: whatever the text, the loss stays bounded.

    Args:
      tokens: the prompt.
      most: tokens of a guess at most.

    Attributes:
      patience: tokens worth making before the next guess is asked for: one after a guess that stood, twice as
        many each time that there was none. Engines that make several by themselves are faster.
      guessed: tokens that were tried.
      accepted: how many of them stood.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._length = min(FIRST_LENGTH, most)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens -> the place after them
        self._plain_s = 0.0
        self._spent_s = 0.0
        self._account_s = 0.0
        self.patience = 1
        self.guessed = 0
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

    def guess(self, room: int) -> list[int]:
        """Return the tokens that may come next, at most `room`; often none."""
        overdrawn = self._account_s < -ALLOWED_LOSS * self._spent_s
        if room < 1 or overdrawn or not self._plain_s:
            return []
        for n in range(LONGEST, SHORTEST - 1, -1):
            place = self._after.get(tuple(self._tokens[-n:])) if n <= len(self._tokens) else None
            if place is not None:
                return self._tokens[place : place + min(self._length, room)]
        return []

    def learn(self, guessed: int, accepted: int, seconds: float, made: int = 1) -> None:
        """Take in what a step gave.

        Args:
          guessed: tokens that were tried.
          accepted: how many of them stood.
          seconds: the whole step took.
          made: tokens that the engine made by itself in a step without guesses.
        """
        self._spent_s += seconds
        if not guessed:
            each = seconds / made
            self._plain_s = KEPT * self._plain_s + (1 - KEPT) * each if self._plain_s else each
            self.patience *= 2
            return
        self.patience = 1 if accepted else 2
        self.guessed += guessed
        self.accepted += accepted
        self._account_s += (accepted + 1) * self._plain_s - seconds
        if accepted == guessed:
            self._length = min(2 * self._length, self._most)
        elif 2 * accepted < guessed:
            self._length = max(self._length // 2, 1)
