"""Byte-level BPE: text to tokens and back."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_atomic
from jaxgpt.shared.tokenizer.added_tokens import AddedToken, AddedTokenFinder
from jaxgpt.shared.tokenizer.backends import Backend, TiktokenBackend, TokenizersBackend
from jaxgpt.shared.tokenizer.byte_alphabet import (
    ENDOFTEXT,
    all_bytes_of,
    bytes_of,
    has_lone_surrogate,
    merges_text,
    spelled_tokens,
)
from jaxgpt.shared.tokenizer.layout import Layout, gpt2_layout, tokenizer_json
from jaxgpt.shared.tokenizer.merge_order import tiktoken_merges_alike

# Pinned by tiktoken (tiktoken_ext.openai_public.gpt2): hash of GPT-2's own merges.txt.
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
SETTINGS_FILE = "tokenizer_config.json"
# What transformers' class for GPT-2 computes whatever tokenizer.json says, and its class for all others.
GPT2_CLASS, ANY_CLASS = "GPT2TokenizerFast", "PreTrainedTokenizerFast"


class Tokenizer:
    """A byte-level BPE.

    tiktoken runs it where it gives the same tokens as `tokenizers` would, else `tokenizers` does.

    Args:
      merges: in order, as GPT-2 spells them: two tokens with a space between; see `parse_merges`.
      name: what messages call it.
      layout: what else decides ids; None for GPT-2's layout: 256 bytes in its order, one token a merge, and
        <|endoftext|> last.
      files: content of the files that it was read from, by name, as far as `save` could not make them
        again.

    Attributes:
      vocab_size: V, the largest id + 1.
      endoftext: id of the token that ends a text: the folder's eos token, else <|endoftext|>.
      bos: id of the token that begins a text; `endoftext` where there is none of its own.
      sha256: identity, a hash of what decides ids: of the canonical merges.txt in GPT-2's layout.

    Raises:
      UserError: the merges contradict themselves, or there are no such tokens.
    """

    def __init__(
        self,
        merges: Sequence[str],
        name: str,
        layout: Layout | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name = name
        self._merges = "\n".join(merges)  # kept as text: as objects they take more memory than all the rest
        self._layout = layout
        self._files = dict(files or {})
        self._token_bytes: dict[int, bytes] | None = None  # of every token; None leaves it to tiktoken
        if layout is None:
            self._init_as_gpt2(merges)
        else:
            self._init_from(layout, merges)

    def _init_as_gpt2(self, merges: Sequence[str]) -> None:
        self.sha256 = hashlib.sha256(merges_text(merges).encode()).hexdigest()
        self.endoftext = self.bos = 256 + len(merges)
        self.vocab_size = self.endoftext + 1
        ranks = {token: rank for rank, token in enumerate(all_bytes_of(spelled_tokens(merges)))}
        if len(ranks) != self.endoftext:
            raise twice(self.name)
        if self.sha256 == GPT2_MERGES_SHA256 or tiktoken_merges_alike(merges):
            self._backend: Backend = TiktokenBackend(ranks, self.name)
        else:
            self._token_bytes = {rank: token for token, rank in ranks.items()}
            self._backend = TokenizersBackend(tokenizer_json(gpt2_layout(merges), merges))

    def _init_from(self, layout: Layout, merges: Sequence[str]) -> None:
        special, whole = layout.special_tokens, layout.whole_vocab
        self.sha256 = layout.identity(merges)
        self.endoftext, self.bos = special[layout.endoftext], special[layout.bos]
        self.vocab_size = max(whole.values()) + 1
        self._token_bytes = {i: bytes_of(token) for token, i in whole.items()}
        self._token_bytes |= {token.id: token.content.encode() for token in layout.added}
        if runs_on_tiktoken(layout, merges):
            made = dict.fromkeys(spelled_tokens(merges))
            ranks = {bytes_of(token): layout.vocab[token] for token in made}
            self._backend = TiktokenBackend(ranks, self.name)
        else:
            self._backend = TokenizersBackend(tokenizer_json(layout, merges))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Any, ...]]:
        return Tokenizer, (self._merge_lines(), self.name, self._layout, self._files)

    @property
    def backend(self) -> str:
        """The library that runs it: tiktoken or tokenizers."""
        return self._backend.name

    @property
    def layout(self) -> Layout:
        """What decides ids besides the merges."""
        return gpt2_layout(self._merge_lines()) if self._layout is None else self._layout

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of every special token, <|endoftext|> included, in the order of their ids."""
        return {ENDOFTEXT: self.endoftext} if self._layout is None else self._layout.special_tokens

    @functools.cached_property
    def _finder(self) -> AddedTokenFinder:
        gpt2 = (AddedToken(content=ENDOFTEXT, id=self.endoftext),)
        return AddedTokenFinder(gpt2 if self._layout is None else self._layout.added)

    def _has_no_added(self, special: bool | Collection[str]) -> bool:
        """Whether every text is ordinary text."""
        return not special and (self._layout is None or all(token.special for token in self._layout.added))

    def encode(self, text: str, special: bool | Collection[str] = False) -> list[int]:
        """Return the tokens of a text.

        Args:
          text: any text but one with lone surrogates.
          special: which special tokens are read where they are written out: none (they are ordinary text),
            all (True; as transformers' AutoTokenizer does), or those of these names.

        Raises:
          UserError: the text can't be encoded.
        """
        if self._has_no_added(special):
            return self._backend.encode(text)
        tokens: list[int] = []
        for piece in self._finder.cut(text, special):
            tokens += self._backend.encode(piece) if isinstance(piece, str) else [piece]
        return tokens

    def encode_batch(
        self, texts: Sequence[str], num_threads: int, special: bool | Collection[str] = False
    ) -> list[list[int]]:
        """Return the tokens of several texts, encoded in parallel; `special` as in `encode`."""
        if self._has_no_added(special):
            return self._backend.encode_batch(texts, num_threads)
        pieces = [self._finder.cut(text, special) for text in texts]
        ordinary = [piece for each in pieces for piece in each if isinstance(piece, str)]
        encoded = iter(self._backend.encode_batch(ordinary, num_threads))
        return [
            [token for piece in each for token in (next(encoded) if isinstance(piece, str) else [piece])]
            for each in pieces
        ]

    @functools.cached_property
    def longest_token(self) -> int | None:
        """How many bytes of a text one token stands for at most.

        None where there is no most: bytes that have no token are lost, or white space goes with an added one.
        """
        if self._layout is not None:
            strips = any(token.lstrip or token.rstrip for token in self._layout.added)
            if strips or not self._layout.has_every_byte:
                return None
        names = [len(name.encode()) for name in self.special_tokens]
        return max(*names, *(len(self.token_bytes(token)) for token in range(self.vocab_size)))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token: a special token's are its name; `endoftext` has none."""
        if token == self.endoftext:
            return b""
        if self._token_bytes is None:
            assert isinstance(self._backend, TiktokenBackend)
            return self._backend.token_bytes(token)
        if not 0 <= token < self.vocab_size:
            raise KeyError(token)
        return self._token_bytes.get(token, b"")  # an id that no token has

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", "replace")

    def merges_text(self) -> str:
        """Return the canonical merges.txt."""
        return merges_text(self._merge_lines())

    def vocab(self) -> dict[str, int]:
        """Return vocab.json: token as GPT-2 spells it -> id."""
        return self.layout.whole_vocab

    def _merge_lines(self) -> list[str]:
        return self._merges.split("\n") if self._merges else []

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """Return a tokenizer with more special tokens, after the last id; those that are there stay.

        Raises:
          UserError: a name is empty, twice, <|endoftext|>, or an ordinary token.
        """
        layout, vocab = self.layout, self.vocab()
        new = [name for name in names if name not in layout.special_tokens]
        for name in names:
            if not name.strip() or list(names).count(name) > 1 or has_lone_surrogate(name):
                raise UserError(f"special token {name!r} must be a text of its own; got {', '.join(names)}")
            if layout.special_tokens.get(name) == self.endoftext:
                raise UserError(f"special token {name!r} separates documents as it is; leave it out")
        if taken := [name for name in new if name in vocab]:
            raise UserError(f"special token {taken[0]!r} is an ordinary token already; choose another name")
        if not new:
            return self
        added = [AddedToken(content=name, id=self.vocab_size + n) for n, name in enumerate(new)]
        layout = dataclasses.replace(layout, added=(*layout.added, *added))
        return Tokenizer(self._merge_lines(), self.name, layout, _files_with(self._files, added))

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Write the tokenizer's files into a folder, as Hugging Face reads them.

        Files that it was read from are written as they were. merges.txt, vocab.json and tokenizer.json are
        always there.

        Args:
          folder: exists.
          model_max_length: tokens that the model takes; then tokenizer_config.json says it too, unless it
            says fewer.
        """
        made = {
            "merges.txt": self.merges_text,
            "vocab.json": lambda: json.dumps(self.vocab(), ensure_ascii=False),
            "tokenizer.json": lambda: json.dumps(self._tokenizer_json(), ensure_ascii=False),
        }
        for name, make in made.items():
            write_atomic(folder / name, self._files[name] if name in self._files else make())
        for name in self._files.keys() - made.keys() - {SETTINGS_FILE}:
            write_atomic(folder / name, self._files[name])
        if settings := self._settings(model_max_length):
            write_atomic(folder / SETTINGS_FILE, settings)

    def _tokenizer_json(self) -> dict[str, Any]:
        return tokenizer_json(self.layout, self._merge_lines())

    def _settings(self, model_max_length: int | None) -> bytes | None:
        """Return tokenizer_config.json: as it was read, completed; None where nothing needs to be said."""
        layout, given = self._layout, self._files.get(SETTINGS_FILE)
        named = ENDOFTEXT if layout is None else layout.endoftext
        as_gpt2 = layout is None or layout.works_as_gpt2
        needed: dict[str, Any] = {}
        if given is None and (model_max_length is not None or named != ENDOFTEXT):
            needed = {
                "add_prefix_space": False,
                "bos_token": named if layout is None else layout.bos,
                "clean_up_tokenization_spaces": False,
                "eos_token": named,
                "pad_token": named,
                "tokenizer_class": GPT2_CLASS if as_gpt2 else ANY_CLASS,
                "unk_token": named,
            }
        value: dict[str, Any] = {} if given is None else json.loads(given)
        if given is not None and not as_gpt2 and value.get("tokenizer_class") is None:
            needed["tokenizer_class"] = ANY_CLASS
        if given is not None and named != ENDOFTEXT and "special_tokens_map.json" not in self._files:
            needed |= {} if value.get("eos_token") else {"eos_token": named}
        said = value.get("model_max_length")
        if model_max_length is not None and not (isinstance(said, int) and 0 < said <= model_max_length):
            needed["model_max_length"] = model_max_length
        if not needed:
            return given
        return (json.dumps(value | needed, indent=2, ensure_ascii=False) + "\n").encode()


def runs_on_tiktoken(layout: Layout, merges: Sequence[str]) -> bool:
    """Return whether tiktoken gives the tokens that `tokenizers` would."""
    ids = [layout.vocab[token] for token in dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    whole = layout.works_as_gpt2 and layout.has_every_byte
    return whole and ids == sorted(ids) and tiktoken_merges_alike(merges)


def twice(name: str) -> UserError:
    """Return the error of merges that are there twice."""
    return UserError(f"tokenizer {name}: two merges give the same token; its files are damaged")


def _files_with(files: Mapping[str, bytes], added: Sequence[AddedToken]) -> dict[str, bytes]:
    """Return the files that stay when tokens are added: settings, which name the tokens, and templates."""
    names = (SETTINGS_FILE, "special_tokens_map.json", "chat_template.jinja")
    kept = {name: files[name] for name in names if name in files}
    if SETTINGS_FILE in kept:
        value = json.loads(kept[SETTINGS_FILE])
        if "added_tokens_decoder" in value:
            for token in added:
                entry = dataclasses.asdict(token) | {"single_word": False}
                value["added_tokens_decoder"][str(entry.pop("id"))] = entry
            kept[SETTINGS_FILE] = json.dumps(value, indent=2, ensure_ascii=False).encode()
    return kept
