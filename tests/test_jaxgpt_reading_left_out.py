"""Rows, folders and files that are easily lost: read, or left out and named."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Command, assert_one_line_error, rows, write_jsonl
from test_jaxgpt_reading import FUNCTION, texts

from jaxgpt.data import tables
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.shared.errors import UserError


def preparing(source: Path) -> tuple[object, ...]:
    return ("jaxgpt", "prepare", "--source", source, "--tokenizer", "gpt2", "--val-fraction", 0.3)


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


def test_a_table_that_is_said_to_be_left_out_gives_no_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", [{"q": "one", "a": "two"}])
    (tmp_path / "other.json").write_text(json.dumps([{"a": f"row {n}"} for n in range(8)]))
    write_jsonl(tmp_path / "late.jsonl", [{"a": "first"}, {"q": "later", "a": "second"}])
    source = open_source(str(tmp_path), ReadOptions(template=r"{q}\n{a}"))
    assert [document.text for document in source.documents] == ["one\ntwo", "\nfirst", "later\nsecond"]
    assert "1 .json files that are no table with q and a (other.json)" in source.report.summary()


def test_a_column_that_comes_late_in_a_large_table_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "HELD_CHARACTERS", 5)
    rows = [*({"a": f"x{n}"} for n in range(9)), {"q": "y", "a": "z"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    options = ReadOptions(template="{q}-{a}")
    found = [document.text for document in open_source(str(tmp_path / "a.jsonl"), options).documents]
    assert found == [*(f"-x{n}" for n in range(9)), "y-z"]
    write_jsonl(tmp_path / "a.jsonl", rows[:-1])
    with pytest.raises(UserError, match="has no column 'q'"):
        list(open_source(str(tmp_path / "a.jsonl"), options).documents)


def test_a_cut_table_is_said_to_be_read_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} {hash(str(n))}"}) + "\n" for n in range(3000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-2000])
    source = open_source(str(tmp_path), ReadOptions(skip_errors=True))
    assert 0 < len(list(source.documents)) < 3000
    assert "1 damaged tables, from there on (" in source.report.summary()


def test_a_template_of_one_column_is_a_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "  "}])
    (tmp_path / "b.csv").write_text("text,n\ntwo,1\n")
    template = ReadOptions(template="Title: {text}")
    found = [document.text for document in open_source(str(tmp_path), template).documents]
    assert found == ["Title: one", "Title: two"]
    (tmp_path / "b.csv").write_text("body,n\ntwo,1\n")
    with pytest.raises(UserError, match="has no column 'text'; it has body, n"):
        list(open_source(str(tmp_path / "b.csv"), template).documents)


def test_columns_of_arrow_that_nobody_asked_for_may_hold_anything(tmp_path: Path) -> None:
    times = pa.array([2**62], pa.int64()).view(pa.timestamp("s"))
    table = pa.table({"text": ["a text"], "when": times})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a text"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_stream(tmp_path / "b.arrow", twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(UserError, match=r"b\.arrow is no readable arrow table"):
        texts(tmp_path / "b.arrow")


def test_a_readme_is_a_data_set_card_beside_data_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("What this is.")
    (tmp_path / "package.json").write_text("{}")
    assert texts(tmp_path) == ["What this is."]
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert texts(tmp_path) == ["x"]
    for chosen in (ReadOptions(exclude=("*.csv",)), ReadOptions(include=("*.md",))):
        assert [each.text for each in open_source(str(tmp_path), chosen).documents] == ["What this is."]


def test_a_folder_that_can_not_be_entered_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).write_text("a text")
    stat = os.stat

    def refusing(path: object, *args: object, **more: object) -> os.stat_result:
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refusing)
    source = open_source(str(tmp_path))
    assert source.report.summary() == "1 files that can not be read (closed/b.txt)"
    monkeypatch.undo()
    assert [document.text for document in source.documents] == ["a text"]


def test_what_was_left_out_is_named_once(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*rows(30), {"text": 1}])
    call = preparing(tmp_path / "a.jsonl")
    _, out, _ = command(*call, "--skip-errors", "--json", "--out", tmp_path / "d")
    (found,) = json.loads(out)["left_out"].values()
    assert found["count"] == len(found["first"]) == 1


def test_a_link_to_itself_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    call = preparing(tmp_path / "loop")
    assert_one_line_error(command(*call, "--out", tmp_path / "d"), "loop")


def test_a_file_of_the_user_s_in_a_data_set_stays(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows(30))
    call = preparing(tmp_path / "a.jsonl")
    assert command(*call, "--out", tmp_path / "d")[0] == 0
    (tmp_path / "d" / "notes.json").write_text("{}")
    refused = command(*call, "--out", tmp_path / "d", "--overwrite")
    assert_one_line_error(refused, "holds files of something else (notes.json)")
    assert (tmp_path / "d" / "notes.json").exists()
