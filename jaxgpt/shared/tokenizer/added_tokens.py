"""Finds added tokens, special ones among them, in a text, as `tokenizers` does.

First those that are looked for in the raw text, then, in what is left, those that a normalizer would precede
(`normalized`); of two that begin at the same place the longer one.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

# What Unicode calls White_Space, as the regular expressions of tiktoken and `tokenizers` know it; Python's
# own class has four control characters more.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE_BEFORE = re.compile(f"[{WHITE_SPACE}]*\\Z")
_SPACE_AFTER = re.compile(f"[{WHITE_SPACE}]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found as a whole, before the BPE sees the text.

    Attributes:
      content: as it is written.
      id: its number.
      special: ordinary text that happens to be written so can be kept apart from it.
      lstrip: white space before it belongs to it.
      rstrip: white space after it belongs to it.
      normalized: looked for after those that are not.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class AddedTokenFinder:
    """Cuts texts at added tokens.

    Args:
      tokens: all of them.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        groups = ([t for t in tokens if not t.normalized], [t for t in tokens if t.normalized])
        self._patterns = [_pattern(group) for group in groups if group]

    def cut(self, text: str, special: bool | Collection[str]) -> list[str | int]:
        """Return the pieces of a text in order: ordinary text, and the ids of added tokens.

        Args:
          text: to cut.
          special: which special tokens count: all, none, or these; the others stay ordinary text. Added
            tokens that are not special always count.
        """
        pieces: list[str | int] = [text] if text else []
        for pattern in self._patterns:
            pieces = [
                part
                for piece in pieces
                for part in (self._cut(pattern, piece, special) if isinstance(piece, str) else [piece])
            ]
        return pieces

    def _cut(
        self, pattern: re.Pattern[str], text: str, special: bool | Collection[str]
    ) -> Iterator[str | int]:
        done = 0
        for match in pattern.finditer(text):
            token = self._tokens[match[0]]
            if token.special and not (special if isinstance(special, bool) else token.content in special):
                continue
            start, stop = match.span()
            if start < done:  # its first characters, white space, belong to the token before
                continue
            if token.lstrip and (space := _SPACE_BEFORE.search(text, done, start)):
                start = space.start()
            if token.rstrip and (space := _SPACE_AFTER.match(text, stop)):
                stop = space.end()
            if done < start:
                yield text[done:start]
            yield token.id
            done = stop
        if done < len(text):
            yield text[done:]


def _pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
