"""What the files beside a vocabulary say of its tokens, as transformers reads them.

tokenizer_config.json names the special tokens and may list added ones; where it lists none (older folders),
special_tokens_map.json and added_tokens.json do.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.tokenizer.added_tokens import AddedToken
from jaxgpt.shared.tokenizer.byte_alphabet import ENDOFTEXT
from jaxgpt.shared.tokenizer.tokenizer_json import added_token

ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA_ROLES = ("additional_special_tokens", "extra_special_tokens")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
CLASSES = (*GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What the files say.

    Attributes:
      path: of tokenizer_config.json, for messages.
      tokenizer_class: of transformers; None where no file says it.
      named: the roles' tokens: eos_token -> its entry.
      extra: entries of special tokens without a role.
      listed: added tokens with their ids.
    """

    path: Path
    tokenizer_class: str | None = None
    named: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    extra: tuple[Mapping[str, Any], ...] = ()
    listed: tuple[AddedToken, ...] = ()

    @property
    def special_names(self) -> set[str]:
        """Contents of all that it calls special."""
        return {entry["content"] for entry in (*self.named.values(), *self.extra)}

    @property
    def takes_gpt2_defaults(self) -> bool:
        """Whether transformers' class takes <|endoftext|> for a role that no file names."""
        unnamed = any(role not in self.named for role in ("bos_token", "eos_token", "unk_token"))
        return unnamed and self.tokenizer_class in (None, *GPT2_CLASSES)

    def adds_nothing_to_gpt2(self, endoftext: int) -> bool:
        """Whether <|endoftext|>, with that id, is the only special or added token."""
        plain = [dataclasses.replace(token, normalized=False) for token in self.listed]
        return self.special_names <= {ENDOFTEXT} and all(
            token == AddedToken(content=ENDOFTEXT, id=endoftext) for token in plain
        )


def read_token_settings(values: Mapping[str, dict[str, Any]], folder: Path) -> TokenSettings:
    """Read the settings.

    Args:
      values: what the folder's files hold, by name.
      folder: for messages.

    Raises:
      UserError: they are damaged, or ask for what is not computed here.
    """
    path = folder / "tokenizer_config.json"
    with damaged(path, "fetch it again"):
        config = dict(values.get("tokenizer_config.json", {}))
        _refuse(config, path)
        decoder = config.get("added_tokens_decoder")
        if decoder is None:
            config |= values.get("special_tokens_map.json", {})
        named = {role: _entry(config[role]) for role in ROLES if config.get(role) is not None}
        own = [
            name for name in config if name.endswith("_token") and name not in ROLES
        ]  # such as image_token
        extra = [_entry(config[name]) for name in own if isinstance(config[name], str)]
        for role in EXTRA_ROLES:
            tokens = config.get(role) or []
            extra += [_entry(each) for each in (tokens.values() if isinstance(tokens, dict) else tokens)]
        settings = TokenSettings(
            path=path, tokenizer_class=config.get("tokenizer_class"), named=named, extra=tuple(extra)
        )
        if decoder is not None:
            listed = [added_token(entry, path, int(number)) for number, entry in decoder.items()]
        else:
            special = settings.special_names
            listed = [
                added_token({"content": name}, folder / "added_tokens.json", number, name in special)
                for name, number in values.get("added_tokens.json", {}).items()
            ]
        return dataclasses.replace(settings, listed=tuple(sorted(listed, key=lambda token: token.id)))


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    if config.get("add_prefix_space"):
        raise UserError(f"{path} has add_prefix_space true; GPT-2's tokenizer adds no space")
    for name in ("add_bos_token", "add_eos_token"):
        if config.get(name):
            raise UserError(f"{path} has {name} true; this program adds no tokens to a text")
    if config.get("split_special_tokens"):
        raise UserError(f"{path} has split_special_tokens true; this program reads them as single tokens")
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in CLASSES:
        raise UserError(
            f"{path} has tokenizer_class {quoted(kind)}, which is not computed here; expected one of "
            f"{', '.join(CLASSES)} (the last two go by tokenizer.json)"
        )


def _entry(value: Any) -> Mapping[str, Any]:
    entry = {"content": value} if isinstance(value, str) else dict(value)
    if not isinstance(entry["content"], str):
        raise ValueError(f"a special token {quoted(entry['content'])}")
    return entry
