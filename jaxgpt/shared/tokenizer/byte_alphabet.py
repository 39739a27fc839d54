"""GPT-2's way to write bytes as printable characters, and merges.txt, which is written so."""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.shared.errors import UserError

ENDOFTEXT = "<|endoftext|>"
MERGES_HEADER = "#version: 0.2"
# A byte is itself where that is a printable character, else the next character from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_ORDER = _PRINTABLE + [b for b in range(256) if b not in set(_PRINTABLE)]
_CHARACTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(_BYTE_ORDER[len(_PRINTABLE) :])
}
ALPHABET = tuple(_CHARACTERS[b] for b in _BYTE_ORDER)  # in the order of GPT-2's ids
_SEPARATOR = chr(256)  # beyond the bytes
_LATIN = {ord(character): b for b, character in _CHARACTERS.items()}


def spell(token: bytes) -> str:
    """Return a token in GPT-2's printable spelling."""
    return "".join(_CHARACTERS[b] for b in token)


def bytes_of(token: str) -> bytes:
    """Return the bytes of a token in that spelling; one with other characters stands for itself, in UTF-8."""
    spelled = all(ord(character) in _LATIN for character in token)
    return token.translate(_LATIN).encode("latin-1") if spelled else token.encode()


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a character, which UTF-8 can't."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def all_bytes_of(tokens: Sequence[str]) -> list[bytes]:
    """Return the bytes of many tokens, all in GPT-2's spelling."""
    joined = "\n".join(tokens).translate(_LATIN | {ord("\n"): ord(_SEPARATOR)})
    return [token.encode("latin-1") for token in joined.split(_SEPARATOR)]


def spelled_tokens(merges: Sequence[str]) -> list[str]:
    """Return the 256 bytes and what each merge makes, in GPT-2's order."""
    return [*ALPHABET, *(merge.replace(" ", "") for merge in merges)]


def gpt2_vocab(merges: Sequence[str]) -> dict[str, int]:
    """Return the vocabulary in GPT-2's layout: bytes, one token a merge, <|endoftext|>; token -> id."""
    return {token: rank for rank, token in enumerate([*spelled_tokens(merges), ENDOFTEXT])}


def parse_merges(text: str, where: Path) -> list[str]:
    """Return the merges of a merges.txt, a line each; UserError names the first line that is none."""
    lines = text.split("\n")
    foreign = set(text) - {*ALPHABET, " ", "\n"}
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if line.count(" ") != 1 or line[0] == " " or line[-1] == " " or (foreign and foreign & set(line)):
            raise UserError(f"{where} line {number} is not a merge of two tokens: {line[:40]!r}")
        merges.append(line)
    return merges


def merges_text(merges: Sequence[str]) -> str:
    """Return the canonical merges.txt."""
    return "".join(f"{line}\n" for line in (MERGES_HEADER, *merges))
