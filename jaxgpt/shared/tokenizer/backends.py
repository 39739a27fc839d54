"""The two libraries that turn ordinary text into tokens: tiktoken, else `tokenizers`.

Both see text without added tokens; see added_tokens.py. A panic of their Rust code is no error that Python
code expects; it becomes a UserError here.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import tiktoken

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer.added_tokens import WHITE_SPACE

# GPT-2's own pattern, as tiktoken spells it (tiktoken_ext.openai_public.r50k_pat_str).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# tiktoken's regular expression gives up on longer runs of white space that text follows (at a million).
LONGEST_SPACE = 100_000
_SPACE = re.compile(f"[{WHITE_SPACE}]{{2,}}")


class Backend(Protocol):
    """What encodes ordinary text."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Return the tokens of several texts, encoded in parallel."""
        ...


class TiktokenBackend:
    """tiktoken, for GPT-2's pattern and merges that `tiktoken_merges_alike` approves.

    Args:
      ranks: bytes of a token -> its id; ids of merged tokens in the order of the merges.
      name: of the tokenizer.
    """

    name = "tiktoken"

    def __init__(self, ranks: dict[bytes, int], name: str) -> None:
        self._encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        ranks.clear()  # the encoding has its own copy and keeps this one, 7 MB for GPT-2, for being pickled

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        with refused_text(text):
            if len(text) < LONGEST_SPACE:
                return self._encoding.encode_ordinary(text)
            return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Return the tokens of several texts, encoded in parallel."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; KeyError for a number that is none."""
        return self._encoding.decode_single_token_bytes(token)


def _parts(text: str) -> Iterator[str]:
    """Cut a text where GPT-2's pattern cuts it anyway: around long runs of white space, less the last one."""
    done = 0
    for match in _SPACE.finditer(text):
        start, stop = match.span()
        if stop - start > LONGEST_SPACE and stop < len(text):
            yield text[done:start]
            yield text[start : stop - 1]
            done = stop - 1
    yield text[done:]


class TokenizersBackend:
    """Hugging Face's `tokenizers`, for whatever tiktoken does otherwise.

    Args:
      value: a tokenizer.json whose added tokens are found elsewhere.

    Raises:
      UserError: the library can't read it.
    """

    name = "tokenizers"

    def __init__(self, value: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        text = json.dumps({**value, "added_tokens": []})
        try:
            self._fast = FastTokenizer.from_str(text)
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise  # else: the library raises no narrower class
            line = " ".join(str(error).split())[:200]
            raise UserError(f"the tokenizer can't be read by tokenizers ({line}); fetch it again") from None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        with refused_text(text):
            return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Return the tokens of several texts; the library takes as many threads as RAYON_NUM_THREADS says."""
        with refused_text(*texts):
            found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [list(each.ids) for each in found]


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked; pyo3's class for it can't be imported."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def refused_text(*texts: str) -> Iterator[None]:
    """Say in one line which text can't be encoded.

    Raises:
      UserError: a text holds half of a surrogate pair, or the library panics inside the block.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {text[max(error.start - 10, 0) : error.start + 10]!r} holds the lone surrogate "
                f"U+{ord(text[error.start]):04X} at {error.start}, which UTF-8 can't hold and no token "
                "stands for; replace it (with U+FFFD, say)"
            ) from None
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        longest = max(texts, key=len)
        line = " ".join(str(error).split())[:100]
        raise UserError(
            f"a text of {len(longest):,} characters, {longest[:40]!r}..., can't be encoded ({line}); cut it"
        ) from None
