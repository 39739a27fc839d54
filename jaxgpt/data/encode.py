"""Turns documents into tokens, on several cores, and joins them to the stream that a .bin file holds."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.data.documents import Document
from jaxgpt.shared.console import stderr
from jaxgpt.shared.dataset import TOKEN_DTYPE, Tokens
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

ENCODE_CHUNK = 2000  # documents encoded between two movements of the progress bar


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, threads: int, title: str, special: Collection[str] = ()
) -> list[Tokens]:
    """Encode documents in parallel, with a progress bar on stderr.

    Args:
      texts: the documents.
      tokenizer: that encodes them.
      threads: at least 1.
      title: what the bar says.
      special: special tokens that are read where they are written out; others are ordinary text.

    Returns:
      The tokens of each.
    """
    encoded: list[Tokens] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(title, total=len(texts))
        for start in range(0, len(texts), ENCODE_CHUNK):
            batch = texts[start : start + ENCODE_CHUNK]
            found = tokenizer.encode_batch(batch, threads, special)
            encoded += [np.array(tokens, TOKEN_DTYPE) for tokens in found]
            progress.advance(task, len(batch))
    return encoded


def join(documents: Sequence[Tokens], endoftext: int) -> Tokens:
    """Join documents: <|endoftext|> before the first, between two, and after the last."""
    separator = np.array([endoftext], TOKEN_DTYPE)
    parts = [separator]
    for document in documents:
        parts += [document, separator]
    return np.concatenate(parts)


def answer_mask(document: Document, tokens: Tokens, tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return which tokens of a pair hold a byte of its answer.

    Args:
      document: a pair.
      tokens: (N,), its text encoded as a whole.
      tokenizer: that encoded it.

    Returns:
      (N,), true from the first token of the answer on.

    Raises:
      UserError: the tokens are not the text's bytes one by one (an added token took white space with it), so
        that they don't tell where the answer begins.
    """
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens.tolist()])
    if ends[-1] != len(document.text.encode()):
        raise UserError(
            f"--answers-only: tokenizer {tokenizer.name} does not keep the bytes of {document.text[:40]!r}..."
            ", so where its answer begins is unknown; take another --tokenizer"
        )
    return np.asarray(ends > len(document.text[: document.answer].encode()))


def join_masks(documents: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Join masks as `join` does tokens; the <|endoftext|> after a document belongs to its answer."""
    parts = [np.zeros(1, np.bool_)]
    for document in documents:
        parts += [document, np.ones(1, np.bool_)]
    return np.concatenate(parts)
