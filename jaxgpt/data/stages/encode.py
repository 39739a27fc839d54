"""Turns documents into tokens, on several cores, and joins them to the stream that a .bin file holds."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.dataset import TOKEN_DTYPE, Tokens
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, threads: int = 1, special: Collection[str] = ()
) -> list[Tokens]:
    """Encode documents.

    Args:
      texts: the documents.
      tokenizer: that encodes them.
      threads: at least 1.
      special: special tokens that are read where they are written out; others are ordinary text.

    Returns:
      The tokens of each.
    """
    return [np.array(tokens, TOKEN_DTYPE) for tokens in tokenizer.encode_batch(texts, threads, special)]


def join(documents: Sequence[Tokens], endoftext: int) -> Tokens:
    """Join documents: <|endoftext|> before the first, between two, and after the last."""
    separator = np.array([endoftext], TOKEN_DTYPE)
    return np.concatenate([separator, closed(documents, endoftext)])


def closed(documents: Sequence[Tokens], endoftext: int) -> Tokens:
    """Join documents, <|endoftext|> after each."""
    separator = np.array([endoftext], TOKEN_DTYPE)
    return np.concatenate([separator[:0], *(part for each in documents for part in (each, separator))])


def answer_mask(text: str, answer: int, tokens: Tokens, tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return which tokens of a pair hold a byte of its answer.

    Args:
      text: of the pair.
      answer: where its answer begins, in characters.
      tokens: (N,), the text encoded as a whole.
      tokenizer: that encoded it.

    Returns:
      (N,), true from the first token of the answer on.

    Raises:
      UserError: the tokens are not the text's bytes one by one (an added token took white space with it), so
        that they don't tell where the answer begins.
    """
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens.tolist()])
    if ends[-1] != len(text.encode()):
        raise UserError(
            f"--answers-only: tokenizer {tokenizer.name} does not keep the bytes of {text[:40]!r}..."
            ", so where its answer begins is unknown; take another --tokenizer"
        )
    return np.asarray(ends > len(text[:answer].encode()))
