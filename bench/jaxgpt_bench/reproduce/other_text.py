"""Loss on text from elsewhere."""

import dataclasses
import math
from pathlib import Path

from jaxgpt.data.overlap import OVERLAP_TOKENS
from jaxgpt.data.stages.encode import encode, join
from jaxgpt.data.tables import local_table_documents
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt_bench.quality.contestants import ComparedModels
from jaxgpt_bench.quality.measure import differences, measured_on, xz_bits_per_byte
from jaxgpt_bench.reproduce.figures import OtherTextFigures, OtherTextRow
from jaxgpt_bench.reproduce.memorization import Corpus, overlap


@dataclasses.dataclass(frozen=True)
class OtherText:
    """A table of text from another distribution.

    Attributes:
      path: .jsonl with a column `text`.
      about: what its user says of it.
    """

    path: Path
    about: str

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return sha256_of(self.path)


def parse_other(given: str) -> OtherText:
    """Read an --other-text: a path, or PATH=WORDS.

    Raises:
      UserError: there is no such file.
    """
    path, _, about = (given, "", "") if Path(given).is_file() else given.partition("=")
    if not Path(path).is_file():
        raise UserError(f"--other-text {path} is no file; give FILE.jsonl, or 'FILE.jsonl=what it is'")
    return OtherText(Path(path), about.strip())


def other_documents(other: OtherText) -> list[str]:
    """Return the texts of a table.

    Raises:
      UserError: it is no table, has no column `text`, or no text in it.
    """
    texts = [document.text.strip() for document in local_table_documents(other.path, "text")]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"--other-text {other.path} holds no text; give a table with a column text")
    return texts


def loss_on(other: OtherText, compared: ComparedModels, corpus: Corpus) -> OtherTextFigures:
    """Measure every model on text from elsewhere, and how much of that text is in the training split."""
    models, tokenizer = compared.models, compared.tokenizer
    texts = other_documents(other)
    tokens = join(encode(texts, tokenizer), tokenizer.endoftext)
    # A short text is one short window.
    inputs, targets = windows(tokens, min(compared.block_size, len(tokens) - 1))
    say(f"measuring {len(models)} models on {len(tokens) - 1:,} tokens of {other.path.name}")
    found = measured_on(models, inputs, targets)
    content = "".join(texts).encode()
    shared = overlap(corpus, tokens, tokenizer.endoftext, OVERLAP_TOKENS)
    rows = [
        OtherTextRow(
            name=model.name,
            loss=found[model.name].loss,
            **differences(model, found),
            bits_per_byte=found[model.name].loss * found[model.name].tokens / math.log(2) / len(content),
        )
        for model in models
    ]
    return OtherTextFigures(
        file=other.path.name,
        about=other.about,
        documents=shared["documents"],
        tokens=found[models[0].name].tokens,
        bytes=len(content),
        documents_shared_with_training=shared["sharing"],
        documents_too_short_to_tell=shared["too_short"],
        xz_bits_per_byte=xz_bits_per_byte(content),
        rows=tuple(rows),
    )
