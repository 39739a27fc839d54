"""The tokenizer of a data set, in the work folder: `tokenizer/`, with which all is encoded.

bpe:N is trained on the training documents; of more than 200 MB, on those whose hashes are lowest.
"""

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.make_tokenizer import is_bpe, make_tokenizer
from jaxgpt.data.stages.read import documents_of, parts_of
from jaxgpt.data.work.work_folder import Advance, Stage, Work
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

BPE_BYTES = 200_000_000
_BATCH_BYTES = 1 << 22


def write_tokenizer(work: Work, number: int, advance: Advance) -> dict[str, Any]:
    """Write the tokenizer; return what identifies it and what it was trained on."""
    name, trained_on = str(work.plan["tokenizer"]), None
    texts: Iterator[str] = iter(())
    if is_bpe(name):
        total = sum(
            int(documents.records["bytes"][documents.of("train")].sum())
            for documents in (documents_of(work, part) for part in range(len(parts_of(work))))
        )
        if total > BPE_BYTES:
            trained_on = {"documents": 0, "bytes": 0, "of_bytes": total}
        texts = _sample(work, min(BPE_BYTES / max(total, 1), 1.0), trained_on, advance)
    tokenizer = make_tokenizer(name, texts, work.plan["special"])
    folder = work.place / "tokenizer"
    temporary = folder.with_name(f"tokenizer.tmp-{os.getpid()}")
    temporary.mkdir(exist_ok=True)
    tokenizer.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return {
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "trained_on": trained_on,
    }


def _sample(work: Work, share: float, trained_on: dict[str, int] | None, advance: Advance) -> Iterator[str]:
    """Yield the training documents, or those with the lowest hashes that are about a share of their bytes."""
    left = BPE_BYTES
    for part in range(len(parts_of(work))):
        documents = documents_of(work, part)
        wanted = documents.of("train")
        if trained_on is not None:
            low = np.asarray(documents.records["low"])[wanted]
            wanted = wanted[low.astype(np.float64) / 2**64 < share]
        for _, texts in documents.batches(wanted, _BATCH_BYTES):
            advance(0)
            for text in texts:
                if trained_on is not None:
                    if len(text) > left:
                        return
                    left -= len(text)
                    trained_on["documents"] += 1
                    trained_on["bytes"] += len(text)
                yield text.decode()


@functools.lru_cache(1)
def tokenizer_of(folder: Path, name: str, sha256: str) -> Tokenizer:
    """Return the tokenizer in a folder of work."""
    tokenizer = load_tokenizer(folder / "tokenizer", name)
    assert tokenizer.sha256 == sha256, (tokenizer.sha256, sha256)
    return tokenizer


def tokenizer_in(work: Work) -> Tokenizer:
    """Return the tokenizer with which all is encoded."""
    summary = work.summary(TOKENIZER.name, 0)
    return tokenizer_of(work.place, summary["name"], summary["sha256"])


TOKENIZER = Stage(name="vocabulary", count=lambda work: 1, run=write_tokenizer)
