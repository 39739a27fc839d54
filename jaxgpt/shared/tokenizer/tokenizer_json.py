"""Reading tokenizer.json: a byte-level BPE that is computed here exactly, or a reason why it is not."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.tokenizer.added_tokens import AddedToken
from jaxgpt.shared.tokenizer.byte_alphabet import ALPHABET, has_lone_surrogate, parse_merges
from jaxgpt.shared.tokenizer.layout import BPE_OPTIONS, BYTE_LEVEL

# Pre-tokenizers that may stand beside ByteLevel, as long as they keep the whole text.
SPLITTERS = ("Split", "Digits", "Punctuation", "UnicodeScripts")
BEHAVIORS = (None, "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeFile:
    """What the files say of a BPE, its added tokens not yet completed by settings.

    Attributes:
      merges: in order.
      vocab: spelled token -> id, the added tokens' contents too where the file has them.
      added: added tokens, with the ids that the file gives them.
      pre_tokenizer: see Layout.
      bpe: see Layout.
    """

    merges: list[str]
    vocab: dict[str, int]
    added: tuple[AddedToken, ...] = ()
    pre_tokenizer: tuple[Mapping[str, Any], ...] = (BYTE_LEVEL,)
    bpe: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(BPE_OPTIONS))

    @property
    def works_as_gpt2(self) -> bool:
        """See Layout."""
        return self.pre_tokenizer == (BYTE_LEVEL,) and self.bpe == BPE_OPTIONS


def read_tokenizer_json(value: dict[str, Any], path: Path) -> BpeFile:
    """Read a parsed tokenizer.json.

    Args:
      value: what it holds.
      path: for messages.

    Raises:
      UserError: it is damaged, or something else than a byte-level BPE; the message names what.
    """
    with damaged(path, "fetch it again"):
        model, before = value["model"], value.get("pre_tokenizer") or {}
        steps = list(_flat(before, "pretokenizers"))
        kinds = [step.get("type") for step in steps]
        if model.get("type", "BPE") != "BPE" or kinds.count("ByteLevel") != 1:
            found = " and ".join(map(str, kinds)) or "no pre-tokenizer"
            raise UserError(
                f"{path} is {model.get('type')} after {found}; GPT-2's is BPE after ByteLevel, and only such "
                "byte-level BPEs are computed here"
            )
        _refuse_other_settings(value, path)
        pre_tokenizer = tuple(_splitter(step, path) for step in steps)
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        merges = parse_merges("\n".join(lines), path)
        vocab = {str(token): i for token, i in model["vocab"].items()}
        bpe = {name: model.get(name, default) for name, default in BPE_OPTIONS.items()}
        if all(character in vocab for character in ALPHABET):  # then there is nothing unknown
            bpe = BPE_OPTIONS | {"ignore_merges": bool(bpe["ignore_merges"])}
        added = tuple(added_token(each, path, each["id"]) for each in value.get("added_tokens") or [])
        return BpeFile(merges=merges, vocab=vocab, added=added, pre_tokenizer=pre_tokenizer, bpe=bpe)


def added_token(entry: Mapping[str, Any], path: Path, number: int, special: bool | None = None) -> AddedToken:
    """Return an added token as a file spells it.

    Raises:
      UserError: it is one that is not computed here.
    """
    if entry.get("single_word"):
        raise UserError(
            f"{path} has the added token {quoted(entry['content'])} with single_word, which this program "
            "does not compute; set it to false"
        )
    is_special = bool(entry.get("special", False)) if special is None else special
    content = entry["content"]
    if type(content) is not str or not content or has_lone_surrogate(content) or type(number) is not int:
        raise UserError(f"{path} has an added token {quoted(content)} with id {quoted(number)}")
    return AddedToken(
        content=content,
        id=number,
        special=is_special,
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", not is_special)),
    )


def _flat(value: Mapping[str, Any], inner: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a Sequence in a Sequence, or the one that is none."""
    if value.get("type") == "Sequence":
        for step in value[inner]:
            yield from _flat(step, inner)
    elif value:
        yield value


def _refuse_other_settings(value: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for settings that change ids or lose text."""
    model = value["model"]
    after = list(_flat(value.get("post_processor") or {}, "processors"))
    decoders = list(_flat(value.get("decoder") or {}, "decoders"))
    other = [
        name
        for name, differs in {
            "a normalizer": list(_flat(value.get("normalizer") or {}, "normalizers")),
            "continuing_subword_prefix": model.get("continuing_subword_prefix"),
            "end_of_word_suffix": model.get("end_of_word_suffix"),
            "dropout": model.get("dropout"),
            "a post_processor that adds tokens": any(_adds_tokens(step) for step in after),
            "a decoder that is not ByteLevel": any(step.get("type") != "ByteLevel" for step in decoders),
        }.items()
        if differs
    ]
    if other:
        raise UserError(
            f"{path} has {', '.join(other)}; GPT-2's tokenizer has none of these, and none is computed here"
        )


def _adds_tokens(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "TemplateProcessing":
        return any("SpecialToken" in piece for piece in step["single"])
    return step.get("type") != "ByteLevel"


def _splitter(step: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return a step of the pre-tokenizer without what does not decide ids."""
    kind = step["type"]
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise UserError(f"{path} has add_prefix_space true; GPT-2's tokenizer adds no space")
        return BYTE_LEVEL | {"use_regex": bool(step.get("use_regex", True))}
    if kind not in SPLITTERS or step.get("behavior") not in BEHAVIORS:
        raise UserError(
            f"{path} has the pre-tokenizer {kind} {step.get('behavior') or ''}, which is not computed here; "
            f"beside ByteLevel it may have {', '.join(SPLITTERS)} that keep the whole text"
        )
    return dict(step)
