"""Tokens as texts, as the API names them."""

from jaxgpt.shared.tokenizer import Tokenizer


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token's text; `bytes:\xe6\x97` where it is no whole character: no two have one name."""
    if (name := special_name(tokenizer, token)) is not None:
        return name
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def begin_and_end(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return how the tokens are written that begin and end a text."""
    return special_name(tokenizer, tokenizer.bos) or "", special_name(tokenizer, tokenizer.endoftext) or ""


def special_name(tokenizer: Tokenizer, token: int) -> str | None:
    """Return how a special token is written, such as <|endoftext|>; None for any other."""
    return next((name for name, special in tokenizer.special_tokens.items() if special == token), None)
