"""Rows, folders and files that are easily lost: read, or left out and named."""

import json
from pathlib import Path

from conftest import Command
from test_jaxgpt_reading import FUNCTION, texts

from jaxgpt.data.sources import open_source


def test_a_blank_answer_is_no_answer_and_blank_rows_are_told(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"question {n},{'' if n % 3 else f'answer {n}'}" for n in range(60)]
    path.write_text("question,answer\n" + "\n".join(lines) + "\n")
    given = ("jaxgpt", "prepare", "--source", path, "--tokenizer", "gpt2", "--val-fraction", 0.2, "--json")
    _, out, err = command(
        *given, "--template", r"{question}\n{answer}", "--answers-only", "--out", tmp_path / "a"
    )
    counts = json.loads(out)["counts"]
    assert counts["train_documents"] + counts["val_documents"] == 20
    assert "left out: 40 rows without text" in err
    _, out, err = command(*given, "--text-column", "answer", "--out", tmp_path / "b")
    assert "left out: 40 blank documents" in err
    assert json.loads(out)["left_out"]["blank documents"]["count"] == 40


def test_columns_of_one_line_are_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"text": ["a text", "another text"], "n": [1, 2]}
    for content in (json.dumps(value), json.dumps(value, indent=1), json.dumps(value) + "\n\n"):
        path.write_text(content)
        assert texts(path) == ["a text", "another text"]
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    assert texts(path) == ["one", "two"]
    path.write_text('{"n": [1], "m": [2]}\n{"text": "two"}\n')
    assert texts(path) == ["two"]


def test_linked_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "source" / "x.txt").write_text("a text")
    (tmp_path / "other" / "y.txt").write_text("another")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "other")
    source = open_source(str(tmp_path / "source"))
    assert [document.text for document in source.documents] == ["a text"]
    assert source.report.lines() == ["left out: 1 linked folders (link)"]


def test_a_python_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(FUNCTION, encoding="utf-8-sig")
    (tmp_path / "b.py").write_text(FUNCTION, encoding="utf-8")
    first, second = texts(tmp_path)
    assert first == second
