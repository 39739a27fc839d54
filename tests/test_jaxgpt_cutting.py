"""A file that is cut into pieces has the documents of the whole."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxgpt.data.reading import pieces
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.shared.tokenizer import ENDOFTEXT

TEXTS = [f"Document {i}: {'alpha beta gamma delta '[: i % 20]}" for i in range(400)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_a_cut_file_has_the_documents_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    if path.suffix == ".txt":
        path.write_text(ENDOFTEXT.join(TEXTS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=30)
    else:
        path.write_text("\n" + "".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    for limit in (500, 503, 1 << 20):
        monkeypatch.setattr(pieces, "LEAST_BYTES", limit)
        found = open_source(str(path))
        assert (len(found.pieces) > 5) == (limit < 1000)
        assert [document.text for document in found.documents] == TEXTS


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n", " ", "é"])
def test_a_lone_text_is_cut_between_words_where_it_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    monkeypatch.setattr(pieces, "LEAST_BYTES", 4001)
    monkeypatch.setattr(pieces, "_WINDOW_BYTES", 1000)
    words = [f"wört{i}" * 5 for i in range(2000)]
    (tmp_path / "a.md").write_bytes(separator.join(words).encode())
    found = open_source(str(tmp_path / "a.md"), ReadOptions())
    assert len(found.pieces) > 10
    documents = [document.text for document in found.documents]
    if separator == "é":
        assert "".join(documents) == separator.join(words)
    else:
        assert " ".join(documents).split() == words
