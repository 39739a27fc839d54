"""One Tokenizer for every byte-level BPE: GPT-2's own, one trained here, one of a Hugging Face folder.

    byte_alphabet.py   bytes as printable characters; merges.txt
    layout.py          what decides ids besides the merges: vocabulary, added tokens, pre-tokenizer
    merge_order.py     whether tiktoken merges as the list of merges says
    added_tokens.py    finds special and added tokens in a text
    backends.py        tiktoken, else `tokenizers`, for the text between them
    tokenizer.py       the class
    tokenizer_json.py, token_settings.py, folder.py   reading a folder, as transformers reads it
    gpt2_files.py      GPT-2's own merges
    named.py           what `--tokenizer gpt2|FOLDER` means

Neither JAX nor PyTorch; `tokenizers` is imported only where tiktoken can't run a tokenizer.
"""

from jaxgpt.shared.tokenizer.byte_alphabet import ENDOFTEXT, parse_merges, spell
from jaxgpt.shared.tokenizer.folder import has_tokenizer, load_tokenizer
from jaxgpt.shared.tokenizer.gpt2_files import gpt2_tokenizer
from jaxgpt.shared.tokenizer.named import MIN_BYTE_LEVEL, OF_CHARACTERS, named_tokenizer
from jaxgpt.shared.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ENDOFTEXT",
    "MIN_BYTE_LEVEL",
    "OF_CHARACTERS",
    "Tokenizer",
    "gpt2_tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "named_tokenizer",
    "parse_merges",
    "spell",
]
