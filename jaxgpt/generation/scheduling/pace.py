"""How much of a long prompt a step takes while other texts run."""

WHOLE_STEP_ROWS = 256  # of a step in which no other text waits; after it a text can be cancelled
LEAST_ROWS = 8
LONGER = 0.7  # a step with part of a prompt may take this share of a quiet step's time in addition
SMOOTHING = 0.8  # weight of the old mean
MOST_APART = 1.5  # factor by which one step's time may differ from the mean: the machine may serve others too


class Pace:
    """Chooses the rows of a prompt in a step from what steps took before.

    A step that takes part of a prompt beside running texts may take 1.7 times as long as one without: they go
    on, and the prompt does too.
    """

    def __init__(self) -> None:
        self._quiet_s = 0.0  # of a step without a prompt
        self._row_s = 0.0  # of a prompt's row

    def rows(self, decoding: int) -> int:
        """Return how many rows of prompts the next step takes beside so many texts that decode."""
        if not decoding:
            return WHOLE_STEP_ROWS
        if not self._row_s or not self._quiet_s:
            return LEAST_ROWS
        rows = int(LONGER * self._quiet_s / self._row_s)
        return min(max(rows // LEAST_ROWS * LEAST_ROWS, LEAST_ROWS), WHOLE_STEP_ROWS)

    def update(self, decoding: int, prompt_rows: int, seconds: float) -> None:
        """Take in what a step took."""
        if not prompt_rows:
            self._quiet_s = _smooth(self._quiet_s, seconds)
        elif not decoding or not self._row_s:
            self._row_s = _smooth(self._row_s, seconds / prompt_rows)
        else:
            self._row_s = _smooth(self._row_s, max(seconds - self._quiet_s, 0.0) / prompt_rows)


def _smooth(old: float, new: float) -> float:
    """Return the mean of before moved towards a new value; one step that was held up moves it little."""
    if not old:
        return new
    return SMOOTHING * old + (1 - SMOOTHING) * min(max(new, old / MOST_APART), MOST_APART * old)
