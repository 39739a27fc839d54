"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as llama.cpp's clients and lm-eval use them."""

from typing import Any

from jaxgpt_export.serve.api.api_error import ApiError, bad_value
from jaxgpt_export.serve.api.request_fields import Fields
from jaxgpt_export.serve.api.token_names import begin_and_end
from jaxgpt_export.serve.served_model import ServedModel


def tokenize(model: ServedModel, fields: Fields) -> dict[str, Any]:
    """Return the tokens of a text, the field `content` or `prompt`; special tokens are read as such."""
    name = "content" if fields.get("content") is not None else "prompt"
    if fields.get(name) is None:
        raise ApiError(400, "content is missing, expected a text", param="content", code="missing_value")
    tokens = model.tokenizer.encode(fields.text(name), special=True)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": model.block_size}


def detokenize(model: ServedModel, fields: Fields) -> dict[str, Any]:
    """Return the text of tokens, under both names; special tokens are written as `tokenize` reads them."""
    tokens = fields.get("tokens")
    fits = isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
    if (
        not isinstance(tokens, list)
        or not fits
        or not all(0 <= t < model.tokenizer.vocab_size for t in tokens)
    ):
        raise bad_value("tokens", tokens, f"a list of ids from 0 to {model.tokenizer.vocab_size - 1}")
    special = model.tokenizer.special_tokens
    names = {token: name.encode() for name, token in special.items()}
    parts = (names.get(token) or model.tokenizer.token_bytes(token) for token in tokens)
    text = b"".join(parts).decode("utf-8", "replace")
    return {"content": text, "prompt": text}


def tokenizer_info(model: ServedModel) -> dict[str, Any]:
    """Return what a client needs to know to use the tokenizer from afar."""
    begin, end = begin_and_end(model.tokenizer)
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": model.tokenizer.vocab_size,
        "model_max_length": model.block_size,
        "bos_token": begin,
        "eos_token": end,
        "eos_token_id": model.tokenizer.endoftext,
        "chat_template": model.chat_template and model.chat_template.source,
    }
