"""The dataset folder, as `jaxgpt prepare` writes it and everything else reads it.

    DATA/train.bin  DATA/val.bin   uint16 tokens: <|endoftext|> document <|endoftext|> ... <|endoftext|>
    DATA/train-00000.bin ...       in place of train.bin where there is much text: the same stream, cut
    DATA/manifest.json             source, tokenizer and its hash, counts, split rule, hash of each file
    DATA/train.mask.bin  val.mask.bin   with --answers-only, a bit a token, lowest first: the loss counts it;
                                   train-00000.mask.bin ... beside shards
    DATA/vocab.json  merges.txt  tokenizer.json   the tokenizer, in GPT-2's files

    opening.py         the folder as a Dataset, checked
    shards.py          a stream in several files, by memory map
    windows.py         a split cut into windows for a loss
    checked_files.py   hashes, computed once and remembered

Standard library and numpy only.
"""

from jaxgpt.shared.dataset.opening import (
    DATASET_FORMAT_VERSION,
    MASKED_FORMAT_VERSION,
    SHARDED_FORMAT_VERSION,
    Dataset,
    mask_name,
    open_dataset,
    shard_name,
)
from jaxgpt.shared.dataset.shards import TOKEN_DTYPE, Mask, ShardedMask, ShardedTokens, Tokens, pack_mask
from jaxgpt.shared.dataset.windows import check_tokens, count_windows, counted, windows

__all__ = [
    "DATASET_FORMAT_VERSION",
    "MASKED_FORMAT_VERSION",
    "SHARDED_FORMAT_VERSION",
    "TOKEN_DTYPE",
    "Dataset",
    "Mask",
    "ShardedMask",
    "ShardedTokens",
    "Tokens",
    "check_tokens",
    "count_windows",
    "counted",
    "mask_name",
    "open_dataset",
    "pack_mask",
    "shard_name",
    "windows",
]
