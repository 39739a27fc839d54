"""Whether tiktoken merges as a list of merges says.

`tokenizers` merges a pair of tokens where the list has that pair. tiktoken does not look at pairs: it merges
two neighbours wherever together they are a token, the earliest token first. The two give the same tokens for
every text if each token, encoded alone by the tokens before it, ends as the two parts that its merge names:
then no other two parts of it ever lie side by side when its turn comes.
"""

from collections.abc import Sequence

from jaxgpt.shared.tokenizer.byte_alphabet import ALPHABET


def tiktoken_merges_alike(merges: Sequence[str]) -> bool:
    """Return whether tiktoken, with tokens ranked by their first merge, does what the merges say.

    Args:
      merges: in order, two spelled tokens with a space between.

    Returns:
      False also for merges of tokens that only later ones make.
    """
    ranks = dict.fromkeys(ALPHABET, -1)
    parts: dict[str, tuple[str, str]] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ranks or right not in ranks:
            return False
        token = left + right
        if token in ranks:  # a second pair for a token is never met if the first one always is
            continue
        if _is_crossed(left, right, rank, ranks, parts):
            return False
        ranks[token], parts[token] = rank, (left, right)
    return True


def _is_crossed(
    left: str, right: str, rank: int, ranks: dict[str, int], parts: dict[str, tuple[str, str]]
) -> bool:
    """Whether an earlier merge joins a piece of `left` with one of `right` while the two are being made.

    Walks back through time: the last piece of `left` and the first of `right` as they lay side by side.
    Both are taken apart in the reverse order of their making (of equals the left one is made first).
    """
    left_until = right_until = rank  # when the two pieces become part of larger ones
    while len(left) > 1 or len(right) > 1:
        if ranks[left] > ranks[right]:
            left_until, left = ranks[left], parts[left][1]
        else:
            right_until, right = ranks[right], parts[right][0]
        joined = ranks.get(left + right, rank)
        if joined < left_until and joined <= right_until:
            return True
    return False
