"""Reading a folder's tokenizer: tokenizer.json, or vocab.json with merges.txt, and the files beside them.

Everything that loads a tokenizer comes here: artifacts, data sets, runs, folders of Hugging Face. The ids are
those of transformers' AutoTokenizer, or the folder is refused.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import MAX_VOCAB_SIZE
from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.tokenizer.added_tokens import AddedToken
from jaxgpt.shared.tokenizer.byte_alphabet import (
    ENDOFTEXT,
    gpt2_vocab,
    has_lone_surrogate,
    parse_merges,
    spelled_tokens,
)
from jaxgpt.shared.tokenizer.layout import Layout, gpt2_layout, tokenizer_json
from jaxgpt.shared.tokenizer.token_settings import GPT2_CLASSES, TokenSettings, read_token_settings
from jaxgpt.shared.tokenizer.tokenizer import Tokenizer, twice
from jaxgpt.shared.tokenizer.tokenizer_json import BpeFile, added_token, read_tokenizer_json

BPE_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
SIDE_FILES = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary, whole or damaged."""
    return any((folder / name).exists() for name in BPE_FILES)


def load_tokenizer(folder: Path, name: str = "bpe") -> Tokenizer:
    """Read the tokenizer of a folder.

    Args:
      folder: with tokenizer.json, or vocab.json and merges.txt; where all three are, they must agree.
      name: what messages call it.

    Raises:
      UserError: a file is missing, damaged, contradicts another, or says something that is not computed here.
    """
    files = _read_files(folder)
    parsed = {file: _parse(files[file], folder / file) for file in SIDE_FILES[:3] if file in files}
    settings = read_token_settings(parsed, folder)
    if (merges := _as_written_here(files, settings, folder)) is not None:
        return Tokenizer(merges, name, None, {file: files[file] for file in SIDE_FILES if file in files})
    bpe = _read_bpe(files, folder)
    if len(set(bpe.merges)) != len(bpe.merges):
        raise twice(f"in {folder}")
    layout = _layout(bpe, settings, folder)
    if "tokenizer.json" in files and "vocab.json" in files:
        _check_agreement(files, bpe, layout, settings, folder)
    is_gpt2 = layout.is_gpt2(bpe.merges)
    return Tokenizer(bpe.merges, name, None if is_gpt2 else layout, files)


def _read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files by name."""
    if not has_tokenizer(folder):
        raise UserError(
            f"tokenizer in {folder} can't be read: expected tokenizer.json, or vocab.json and merges.txt"
        )
    try:
        files = {
            name: (folder / name).read_bytes()
            for name in (*BPE_FILES, *SIDE_FILES)
            if (folder / name).is_file()
        }
    except OSError as error:
        raise UserError(
            f"tokenizer in {folder} can't be read: {error.strerror} ({error.filename}); check its permissions"
        ) from None
    for one, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if one in files and other not in files:
            raise UserError(
                f"tokenizer in {folder} can't be read: {one} is there, {other} is missing; restore it, or "
                "remove both where there is a tokenizer.json"
            )
    return files


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"tokenizer in {path.parent} can't be read: {path.name} is no JSON in UTF-8 ({error}); restore it"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"tokenizer {path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_merges(files: Mapping[str, bytes], folder: Path) -> list[str]:
    try:
        text = files["merges.txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"tokenizer in {folder} can't be read: merges.txt is not UTF-8 ({error}); restore it"
        ) from None
    return parse_merges(text.replace("\r\n", "\n"), folder / "merges.txt")


def _as_written_here(files: Mapping[str, bytes], settings: TokenSettings, folder: Path) -> list[str] | None:
    """Return the merges of files in GPT-2's layout that `save` would write just so; None for others.

    This spares parsing, and keeping, what follows from the merges.
    """
    if "merges.txt" not in files:
        return None
    merges = _read_merges(files, folder)
    if not settings.adds_nothing_to_gpt2(256 + len(merges)) or len(set(merges)) != len(merges):
        return None
    if files["vocab.json"] != json.dumps(gpt2_vocab(merges), ensure_ascii=False).encode():
        return None
    if "tokenizer.json" in files:
        value = tokenizer_json(gpt2_layout(merges), merges)
        if files["tokenizer.json"] != json.dumps(value, ensure_ascii=False).encode():
            return None
    return merges


def _read_bpe(files: Mapping[str, bytes], folder: Path) -> BpeFile:
    """Read the BPE, of tokenizer.json where there is one."""
    if "tokenizer.json" not in files:
        vocab = _vocab(_parse(files["vocab.json"], folder / "vocab.json"), folder / "vocab.json")
        return BpeFile(merges=_read_merges(files, folder), vocab=vocab)
    path = folder / "tokenizer.json"
    bpe = read_tokenizer_json(_parse(files["tokenizer.json"], path), path)
    _vocab(bpe.vocab, path)
    return bpe


def _check_agreement(
    files: Mapping[str, bytes], bpe: BpeFile, layout: Layout, settings: TokenSettings, folder: Path
) -> None:
    """Raise UserError unless vocab.json and merges.txt say what tokenizer.json says.

    Special tokens may be written in one of them only, if the files beside them name them.
    """
    vocab, merges = _parse(files["vocab.json"], folder / "vocab.json"), _read_merges(files, folder)
    if len(set(merges)) != len(merges):
        raise twice(f"in {folder}")
    whole = layout.whole_vocab
    beside = settings.special_names | {token.content for token in settings.listed}
    missing = bpe.vocab.keys() - vocab.keys() - beside
    if merges != bpe.merges or missing or not vocab.items() <= whole.items():
        raise UserError(
            f"tokenizer in {folder}: vocab.json ({len(vocab)} tokens) does not follow from merges.txt "
            f"and tokenizer.json ({len(whole)} tokens); restore them from the same place, or remove "
            "vocab.json and merges.txt"
        )


def _vocab(vocab: dict[str, Any], path: Path) -> dict[str, int]:
    """Return a vocabulary whose ids are numbers, each there once."""
    wrong = next((token for token, i in vocab.items() if type(i) is not int or i < 0), None)
    if wrong is not None:
        raise UserError(f"{path} gives {quoted(wrong)} the id {quoted(vocab[wrong])}, expected 0, 1, ...")
    if has_lone_surrogate("".join(vocab)):
        raise UserError(f"{path} has a token that is no UTF-8 text (a lone surrogate); fetch it again")
    if len(set(vocab.values())) != len(vocab):
        raise UserError(f"{path} gives two tokens the same id; fetch it again")
    return vocab


def _layout(bpe: BpeFile, settings: TokenSettings, folder: Path) -> Layout:
    """Complete the added tokens and check that it is a BPE that can be run."""
    made = set(spelled_tokens(bpe.merges))
    if missing := [token for token in spelled_tokens(bpe.merges)[256:] if token not in bpe.vocab]:
        raise UserError(
            f"tokenizer in {folder}: vocab.json does not follow from merges.txt: it lacks {missing[0]!r}, "
            "which a merge makes; restore both from the same place"
        )
    added, endoftext, bos = _added_tokens(bpe, settings, folder)
    keep_all = bool(bpe.bpe["ignore_merges"])
    names = {token.content for token in added}
    vocab = {t: i for t, i in bpe.vocab.items() if keep_all or t in made or t not in names}
    if len({token.normalized for token in added}) == 1:  # then nothing is looked for before anything else
        added = [dataclasses.replace(token, normalized=False) for token in added]
    layout = Layout(
        vocab=vocab,
        added=tuple(added),
        endoftext=endoftext,
        bos=bos,
        pre_tokenizer=bpe.pre_tokenizer,
        bpe=bpe.bpe,
    )
    whole = layout.whole_vocab
    if len(set(whole.values())) != len(whole):
        raise UserError(f"tokenizer in {folder} gives two tokens the same id; fetch it again")
    if max(whole.values()) >= MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer in {folder} has {max(whole.values()) + 1} tokens, at most {MAX_VOCAB_SIZE} fit"
        )
    if not layout.works_as_gpt2 and settings.tokenizer_class in GPT2_CLASSES:
        raise UserError(
            f"{settings.path} has tokenizer_class {settings.tokenizer_class}, which splits text as GPT-2 "
            "does, and tokenizer.json says otherwise; versions of transformers differ here: to go by "
            'tokenizer.json, write "tokenizer_class": "PreTrainedTokenizerFast"'
        )
    return layout


def _added_tokens(bpe: BpeFile, settings: TokenSettings, folder: Path) -> tuple[list[AddedToken], str, str]:
    """Return all added tokens, and which of them ends and which begins a text.

    Ids are given as transformers gives them: one that the vocabulary has, else the next one.
    """
    added: dict[str, AddedToken] = {}
    count = len(bpe.vocab)

    def add(token: AddedToken, said: bool = True) -> None:
        after = max((each.id + 1 for each in added.values()), default=0)
        number = bpe.vocab.get(token.content, max(after, count))
        if token.content not in added:
            if said and token.id != number:
                raise UserError(
                    f"tokenizer in {folder} gives {token.content!r} the id {token.id}, transformers would "
                    f"give it {number}; number added tokens from {count} on, after the vocabulary"
                )
            added[token.content] = dataclasses.replace(token, id=number)
        elif said and token.id != added[token.content].id:
            raise UserError(
                f"tokenizer in {folder}: files disagree on the id of {token.content!r} "
                f"({added[token.content].id} and {token.id}); restore them from the same place"
            )

    for token in (*bpe.added, *settings.listed):
        add(token)
    for entry in (*settings.named.values(), *settings.extra):
        add(added_token(entry, settings.path, 0, special=True), said=False)
        added[entry["content"]] = dataclasses.replace(added[entry["content"]], special=True)
    endoftext = _endoftext(bpe, settings, added, folder)
    ends = [endoftext]
    if settings.takes_gpt2_defaults and bpe.works_as_gpt2 and ENDOFTEXT in {*bpe.vocab, *added}:
        ends.append(ENDOFTEXT)
    for content in ends:
        add(AddedToken(content=content, id=0), said=False)
        added[content] = dataclasses.replace(added[content], special=True)
    bos = settings.named["bos_token"]["content"] if "bos_token" in settings.named else ends[-1]
    return list(added.values()), endoftext, bos


def _endoftext(bpe: BpeFile, settings: TokenSettings, added: Mapping[str, AddedToken], folder: Path) -> str:
    """Return the token that ends a text: the named one, <|endoftext|>, or the one of config.json."""
    if "eos_token" in settings.named:
        return str(settings.named["eos_token"]["content"])
    if ENDOFTEXT in added or ENDOFTEXT in bpe.vocab:
        return ENDOFTEXT
    path = folder / "config.json"
    number = _parse(path.read_bytes(), path).get("eos_token_id") if path.is_file() else None
    if said := [token.content for token in added.values() if token.special and token.id == number]:
        return said[0]
    if settings.tokenizer_class in (None, *GPT2_CLASSES):
        return ENDOFTEXT  # which the class adds
    raise UserError(
        f'tokenizer in {folder} names no token that ends a text; write "eos_token" into {settings.path.name}'
    )
