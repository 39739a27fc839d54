"""Encodes parts of units: the validation documents first, then a shard of training tokens a part.

validation/00012.tokens    documents, <|endoftext|> after each
validation/00012.lengths   for each its tokens (without <|endoftext|>), bytes, and bytes of its answer
validation/00012.counted   with --answers-only: a byte a token, 1 where the loss counts it
training/00012.tokens      as the data set holds it: the first begins with <|endoftext|>
training/00012.mask        with --answers-only: a bit a token
training/00012.hashes      of its runs of 50 tokens those that may be in validation; sorted, 64 bits each
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgpt.data.overlap import HashFilter, run_hashes, sorted_once
from jaxgpt.data.stages.encode import answer_mask, closed, encode
from jaxgpt.data.stages.read import documents_of, parts_of
from jaxgpt.data.stages.vocabulary import tokenizer_in
from jaxgpt.data.work.work_folder import Advance, Stage, Work
from jaxgpt.shared.dataset import TOKEN_DTYPE, Tokens, pack_mask
from jaxgpt.shared.files import new_file
from jaxgpt.shared.tokenizer import Tokenizer

LENGTHS = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("answer_bytes", "<u8")])
_BATCH_BYTES = 1 << 21  # of text that is encoded at a time
_TOKENS_AT_ONCE = 1 << 17  # whose hashes stay in the processor's cache


class StreamWriter:
    """Writes tokens, or the bits of a mask, to a file, and hashes them.

    Args:
      path: the file.
      bits: whether what is given are truth values, 8 to a byte.

    Attributes:
      count: values that were written.
    """

    def __init__(self, path: Path, bits: bool = False) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._bits = bits
        self._rest = np.zeros(0, np.bool_)  # fewer than 8 truth values
        self.count = 0

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and len(self._rest):
            self._write(pack_mask(self._rest))
        self._file.close()

    def add(self, values: npt.NDArray[Any]) -> None:
        """Write values."""
        self.count += len(values)
        if self._bits:
            values = np.concatenate([self._rest, values])
            whole = len(values) // 8 * 8
            self._rest, values = values[whole:], pack_mask(values[:whole])
        self._write(values)

    def _write(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data
        self._hash.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """Hash of what was written; complete when the writer is closed."""
        return self._hash.hexdigest()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Documents as tokens.

    Attributes:
      tokens: (N,), <|endoftext|> after each document.
      lengths: of each document, of LENGTHS.
      counted: (N,), whether the loss counts a token; None for all.
    """

    tokens: Tokens
    lengths: npt.NDArray[Any]
    counted: npt.NDArray[np.bool_] | None


def encoded_batches(work: Work, number: int, split: str, advance: Advance) -> Iterator[Encoded]:
    """Encode the documents of a part that a split keeps."""
    documents, tokenizer = documents_of(work, number), tokenizer_in(work)
    for part, texts in documents.batches(documents.of(split), _BATCH_BYTES):
        answers = documents.records["answer"][part].tolist()
        if work.plan["tokens"]:
            yield _of_tokens(texts, tokenizer)
        else:
            yield _of_texts(work, texts, answers, tokenizer)
        advance(sum(map(len, texts)))


def _of_texts(work: Work, texts: list[bytes], answers: list[int], tokenizer: Tokenizer) -> Encoded:
    decoded = [text.decode() for text in texts]
    found = encode(decoded, tokenizer, work.threads, work.plan["special"])
    lengths = np.zeros(len(texts), LENGTHS)
    lengths["tokens"], lengths["bytes"] = [len(each) for each in found], [len(text) for text in texts]
    counted = None
    if work.plan["answers_only"]:
        masks = []
        for text, answer, tokens in zip(decoded, answers, found, strict=True):
            # <|endoftext|> after a document belongs to its answer
            masks += [answer_mask(text, answer, tokens, tokenizer), np.ones(1, np.bool_)]
        counted = np.concatenate(masks)
        lengths["answer_bytes"] = [
            len(text[answer:].encode()) for text, answer in zip(decoded, answers, strict=True)
        ]
    return Encoded(closed(found, tokenizer.endoftext), lengths, counted)


def _of_tokens(texts: list[bytes], tokenizer: Tokenizer) -> Encoded:
    found = [np.frombuffer(text, TOKEN_DTYPE) for text in texts]
    lengths = np.zeros(len(texts), LENGTHS)
    lengths["tokens"] = [len(each) for each in found]
    lengths["bytes"] = [int(_token_bytes(tokenizer)[each].sum()) for each in found]
    return Encoded(closed(found, tokenizer.endoftext), lengths, None)


@functools.lru_cache(1)
def _token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    return np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])


def encode_validation(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write the validation documents of a part."""
    file = functools.partial(work.path, "validation", number)
    lengths = [np.zeros(0, LENGTHS)]
    with (
        new_file(file(".counted")) as counted_path,
        new_file(file(".tokens")) as path,
        StreamWriter(path) as writer,
        StreamWriter(counted_path) as counted,
    ):
        for batch in encoded_batches(work, number, "val", advance):
            writer.add(batch.tokens)
            lengths.append(batch.lengths)
            if batch.counted is not None:
                counted.add(batch.counted)
    with new_file(file(".lengths")) as path:
        found = np.concatenate(lengths)
        found.tofile(path)
    runs = np.maximum(found["tokens"].astype(np.int64) - 49, 0).sum()
    return {"documents": len(found), "tokens": writer.count, "runs": int(runs)}


def encode_training(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write the shard of a part, and the hashes of its runs that validation may have too."""
    file = functools.partial(work.path, "training", number)
    val_runs = HashFilter.read(work.path("filter", 0, ".bits"))
    found = [np.zeros(0, np.uint64)]
    sums = np.zeros(1, LENGTHS)
    documents = 0
    with (
        new_file(file(".mask")) as mask_path,
        new_file(file(".tokens")) as path,
        StreamWriter(path) as writer,
        StreamWriter(mask_path, bits=True) as mask,
    ):
        if number == 0:
            writer.add(np.array([tokenizer_in(work).endoftext], TOKEN_DTYPE))
            mask.add(np.zeros(1, np.bool_))
        for batch in encoded_batches(work, number, "train", advance):
            writer.add(batch.tokens)
            found.append(_likely_shared(batch.tokens, val_runs))
            documents += len(batch.lengths)
            for name in LENGTHS.names or ():
                sums[name] += batch.lengths[name].sum()
            if batch.counted is not None:
                mask.add(batch.counted)
    hashes = sorted_once(np.concatenate(found))
    with new_file(file(".hashes")) as path:
        hashes.tofile(path)
    return {
        "documents": documents,
        "bytes": int(sums["bytes"][0]),
        "answer_bytes": int(sums["answer_bytes"][0]),
        "tokens": writer.count,
        "sha256": writer.sha256,
        "mask_sha256": mask.sha256,
        "hashes": len(hashes),
    }


def _likely_shared(tokens: Tokens, val_runs: HashFilter) -> npt.NDArray[np.uint64]:
    """Return the hashes of the runs that a filter lets through."""
    parts = [np.zeros(0, np.uint64)]
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        hashes = run_hashes(tokens[start : start + _TOKENS_AT_ONCE + 49])
        parts.append(hashes[val_runs.may_hold(hashes)])
    return np.concatenate(parts)


def _text_bytes(split: str) -> Any:
    def size(work: Work, number: int) -> int:
        documents = documents_of(work, number)
        return int(documents.records["bytes"][documents.of(split)].sum())

    return functools.cache(size)


def _count(work: Work) -> int:
    return len(parts_of(work))


VALIDATION = Stage(
    name="validation",
    count=_count,
    run=encode_validation,
    files=(".tokens", ".lengths", ".counted"),
    size=_text_bytes("val"),
    title="encoding val",
)
TRAINING = Stage(
    name="training",
    count=_count,
    run=encode_training,
    files=(".tokens", ".mask", ".hashes"),
    size=_text_bytes("train"),
    title="encoding train",
)
