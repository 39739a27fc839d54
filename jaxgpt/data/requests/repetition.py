"""How often a text repeats itself: programs that do are left out, models that do are told."""

import itertools
import re
from collections import Counter
from collections.abc import Hashable, Sequence

RUN_LENGTH = 4  # words, or tokens


def words_of(text: str) -> list[str]:
    """Return the words of a text: names and numbers whole, every other character by itself, no spaces."""
    return re.findall(r"\w+|[^\w\s]", text)


def most_repeated(tokens: Sequence[Hashable], length: int = RUN_LENGTH) -> int:
    """Return how often the most frequent run of so many tokens, or words, occurs."""
    runs = zip(*(itertools.islice(tokens, start, None) for start in range(length)), strict=False)
    return max(Counter(runs).values(), default=0)
