"""What decides the ids of a tokenizer besides its merges, and the tokenizer.json that says it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.shared.tokenizer.added_tokens import AddedToken
from jaxgpt.shared.tokenizer.byte_alphabet import ALPHABET, ENDOFTEXT, gpt2_vocab

# GPT-2's pre-tokenizer and BPE, as tokenizer.json spells what decides ids.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE_OPTIONS = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Vocabulary, added tokens and pre-tokenizer of a byte-level BPE.

    Attributes:
      vocab: of the BPE: spelled token -> id. Added tokens that the BPE itself never makes are left out.
      added: special and other added tokens.
      endoftext: the one among them that ends a text.
      bos: the one that begins a text; `endoftext` where a folder names none.
      pre_tokenizer: its steps, as tokenizer.json spells them.
      bpe: BPE_OPTIONS with the values of this one.
    """

    vocab: Mapping[str, int]
    added: tuple[AddedToken, ...]
    endoftext: str = ENDOFTEXT
    bos: str = ENDOFTEXT
    pre_tokenizer: tuple[Mapping[str, Any], ...] = (BYTE_LEVEL,)
    bpe: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(BPE_OPTIONS))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the special ones among the added tokens, in the order of their ids."""
        tokens = sorted(self.added, key=lambda token: token.id)
        return {token.content: token.id for token in tokens if token.special}

    @property
    def whole_vocab(self) -> dict[str, int]:
        """Every token -> id, in the order of the ids."""
        tokens = {**self.vocab, **{token.content: token.id for token in self.added}}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    @property
    def has_every_byte(self) -> bool:
        """Whether no byte of a text can be lost."""
        return all(character in self.vocab for character in ALPHABET)

    @property
    def works_as_gpt2(self) -> bool:
        """Whether texts are cut into words, and words into tokens, by GPT-2's rules."""
        return self.pre_tokenizer == (BYTE_LEVEL,) and self.bpe == BPE_OPTIONS

    def is_gpt2(self, merges: Sequence[str]) -> bool:
        """Whether it follows from the merges: 256 bytes in GPT-2's order, a token a merge, <|endoftext|>."""
        plain = {dataclasses.replace(token, normalized=False) for token in self.added}
        return (
            len(self.vocab) == 256 + len(merges)
            and plain == {AddedToken(content=ENDOFTEXT, id=len(self.vocab))}
            and (self.endoftext, self.bos) == (ENDOFTEXT, ENDOFTEXT)
            and self.works_as_gpt2
            and {**self.vocab, ENDOFTEXT: len(self.vocab)} == gpt2_vocab(merges)
        )

    def identity(self, merges: Sequence[str]) -> str:
        """Return the hash of everything that decides ids."""
        tokens = sorted((dataclasses.astuple(token) for token in self.added), key=lambda token: token[1])
        value = [
            sorted(self.vocab.items(), key=lambda item: item[1]),
            list(merges),
            tokens,
            self.endoftext,
            [dict(step) for step in self.pre_tokenizer],
            dict(self.bpe),
        ]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def gpt2_layout(merges: Sequence[str]) -> Layout:
    """Return the layout of GPT-2: bytes, one token a merge, <|endoftext|> last."""
    vocab = gpt2_vocab(merges)
    return Layout(vocab=vocab, added=(AddedToken(content=ENDOFTEXT, id=vocab.pop(ENDOFTEXT)),))


def tokenizer_json(layout: Layout, merges: Sequence[str]) -> dict[str, Any]:
    """Return the same BPE for Hugging Face's `tokenizers`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [
        byte_level | {"use_regex": step["use_regex"]} if step["type"] == "ByteLevel" else dict(step)
        for step in layout.pre_tokenizer
    ]
    added = [
        {
            "id": token.id,
            "content": token.content,
            "special": token.special,
            "single_word": False,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
        }
        for token in sorted(layout.added, key=lambda token: token.id)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": layout.bpe["unk_token"],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": layout.bpe["fuse_unk"],
            "byte_fallback": layout.bpe["byte_fallback"],
            "ignore_merges": layout.bpe["ignore_merges"],
            "vocab": layout.whole_vocab,
            "merges": list(merges),
        },
    }
