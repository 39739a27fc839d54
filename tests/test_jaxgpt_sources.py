import dataclasses
import gzip
import importlib.metadata
import json
import lzma
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command, assert_one_line_error, rows, write_jsonl

from jaxgpt.data.hub import choose_data_files
from jaxgpt.data.requests.held_out import DEFINES
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.shared.errors import UserError, brief


def texts(source: str) -> list[str]:
    return [document.text for document in open_source(source).documents]


def test_jsonl_and_parquet_of_the_same_rows_give_the_same_documents(tmp_path: Path) -> None:
    made = rows(30)
    write_jsonl(tmp_path / "a.jsonl", made)
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "a.parquet")
    expected = [row["text"] for row in made]
    assert texts(str(tmp_path / "a.jsonl")) == expected
    assert texts(str(tmp_path / "a.parquet")) == expected


def test_folder_gives_every_readable_file_with_code_grouped_by_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("Some notes.")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    code = 'def f(x):\n    """Add one to the number."""\n    y = x + 1\n    return y\n'
    (tmp_path / "code.py").write_text(code + code.replace("f(", "g(").replace("one", "two"))
    documents = list(open_source(str(tmp_path)).documents)
    assert [document.group for document in documents] == ["code.py", "code.py", "sub/notes.txt"]
    assert documents[0].text.startswith("Add one to the number. f(x) ```python\ndef f(x):")


def compress(suffix: str, content: bytes) -> bytes:
    """By the libraries' other interfaces."""
    by_suffix = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": pa.Codec("zstd").compress}
    return bytes(by_suffix[suffix](content))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_text_of_every_kind_gives_the_documents_of_the_plain_text(
    tmp_path: Path, suffix: str
) -> None:
    code = 'def f(x):\n    """Add one to the number."""\n    y = x + 1\n    return y\n'
    lines = "".join(json.dumps(row) + "\n" for row in rows(30))
    columns = {"id": [1, 2], "text": ["first\r\nrow", "second é"]}
    contents = {
        "a.jsonl": lines,
        "b.json": json.dumps(rows(3), indent=1),
        "c.json": json.dumps(columns, indent=1),
        "d.json": lines,
        "e.txt": "one<|endoftext|>two",
        "f.py": code,
    }
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    for name, content in contents.items():
        (plain / name).write_text(content, encoding="utf-8")
        half = len(content.encode()) // 2  # two streams one after the other are one file
        parts = (content.encode()[:half], content.encode()[half:])
        (packed / f"{name}{suffix}").write_bytes(b"".join(compress(suffix, part) for part in parts))
    expected = texts(str(plain))
    assert expected[-2:] == ["two", texts(str(plain / "f.py"))[0]]
    assert columns["text"] == texts(str(plain / "c.json"))
    assert len(expected) == 30 + 3 + 2 + 30 + 2 + 1
    assert texts(str(packed)) == expected


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_archive_is_one_line(command: Command, tmp_path: Path, suffix: str) -> None:
    content = compress(suffix, "".join(json.dumps(row) + "\n" for row in rows(300)).encode())
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF  # may be met as wrong text, before the checksum at the end
    for name, damaged in (("cut", content[:-30]), ("no", b'{"text": "x"}'), ("flipped", bytes(flipped))):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(damaged)
        result = command("jaxgpt", "prepare", "--source", path, "--out", tmp_path / "d")
        parts = ("is damaged or cut", "compress it again") if name != "flipped" else ()
        assert_one_line_error(result, path.name, *parts)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', ("no readable json table: line 2",)),
        ("a.jsonl", '{"text": "x"}\n\n["text"]', ("line 3 is a JSON list", "expected an object")),
        ("a.json", '[{"text": "x"}, {"text": 7}]', ("row 1: column 'text' holds int, no text",)),
        ("a.json", "[1", ("no readable json table: ", "line 1")),
        ("a.json", " ", ("a.json is empty",)),
        ("a.jsonl", b'{"text": "\xff"}', ("is not UTF-8 text",)),
    ],
)
def test_json_that_is_no_table_of_text_is_one_line(
    command: Command, tmp_path: Path, name: str, content: str | bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = command("jaxgpt", "prepare", "--source", tmp_path / name, "--out", tmp_path / "d")
    assert_one_line_error(result, name, *parts)


def test_lone_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i} " + "word " * 60 for i in range(50))
    (tmp_path / "book.txt").write_text(text)
    documents = texts(str(tmp_path / "book.txt"))
    assert len(documents) > 3
    assert "\n\n".join(documents) == text


def test_text_file_with_separators_is_cut_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    assert texts(str(tmp_path / "a.txt")) == ["one", "two"]


def test_packages_reads_installed_source(tmp_path: Path) -> None:
    source = open_source("packages:jaxtyping")
    assert source.revision.startswith("jaxtyping 0.")
    assert all("```python\n" in document.text for document in source.documents)


CODE = 'def f(x):\n    """Add one to the number."""\n    y = x + 1\n    return y\n'


@pytest.fixture
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with documentation beside its code, and what an installation says of it."""
    site, info = tmp_path / "site", "madeup-1.0.dist-info"
    files = {
        "madeup/__init__.py": "",
        "madeup/code.py": CODE,
        "madeup/docs/guide.md": "# How to add",
        "madeup/docs/CHANGES.md": "# 1.0",
        "madeup/docs/one.md": "    def add_one(number):",
        "madeup/.github/hidden.md": "left out",
        "madeup/tests/notes.md": "left out, as tests are",
        "madeup/_vendor/other-2.0.dist-info/METADATA": "Name: other\nVersion: 2.0\n\nAnother package.",
        "madeup/data.csv": "a,b",
        f"{info}/METADATA": "Name: madeup\nVersion: 1.0\n\nIt adds numbers.",
        f"{info}/top_level.txt": "madeup",
    }
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    (site / info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(site)
    return "packages:madeup"


def test_include_takes_the_documentation_of_packages_in(installed_package: str) -> None:
    source = open_source(installed_package)
    assert [document.group for document in source.documents] == ["madeup/code.py"]
    patterns = ReadOptions(include=("*.py", "*.md"), exclude=("*CHANGES*",))
    source = open_source(installed_package, patterns)
    assert source.revision == "madeup 1.0"
    found = {document.group: document.text for document in source.documents}
    assert list(found) == ["madeup/code.py", "madeup/docs/guide.md", "madeup/docs/one.md", "madeup/README.md"]
    assert found["madeup/docs/guide.md"] == "# How to add"
    assert found["madeup/README.md"] == "It adds numbers."
    assert source.report.skipped == {
        "files that --exclude names": 1,
        "files that --include does not name": 2,
        "folders that are hidden, tests or installed packages": 2,
    }
    only = open_source(installed_package, ReadOptions(exclude=("*/code.py",)))
    assert [piece.group for piece in only.pieces] == ["madeup/__init__.py"]
    both = open_source(f"{installed_package},json", ReadOptions(include=("madeup/*.py",)))
    assert both.report.examples["packages of which no file is read"] == ["json"]


@pytest.mark.parametrize("description", ["", "UNKNOWN\n"])
def test_a_package_without_a_description_has_no_readme(
    installed_package: str, tmp_path: Path, description: str
) -> None:
    options = ReadOptions(include=("README*",))
    metadata = tmp_path / "site" / "madeup-1.0.dist-info" / "METADATA"
    metadata.write_text(f"Name: madeup\nVersion: 1.0\n\n{description}")
    assert list(open_source(installed_package, options).documents) == []
    metadata.unlink()
    with pytest.raises(UserError, match="no file of the packages fits"):
        open_source(installed_package, options)


def test_the_readme_of_an_egg_is_read_and_that_of_the_distribution_of_its_name(
    installed_package: str, tmp_path: Path
) -> None:
    info = tmp_path / "site" / "aaa-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: aaa\nVersion: 3.0\n\nIt brings madeup too.")
    (info / "top_level.txt").write_text("madeup")
    options = ReadOptions(include=("README*",))
    source = open_source(installed_package, options)
    assert [document.text for document in source.documents] == ["It adds numbers."]
    assert source.revision == "madeup 1.0"
    old, egg = tmp_path / "site" / "madeup-1.0.dist-info", tmp_path / "site" / "madeup.egg-info"
    old.rename(egg)
    (egg / "METADATA").rename(egg / "PKG-INFO")
    assert [document.text for document in open_source(installed_package, options).documents] == [
        "It adds numbers."
    ]


def test_requests_that_are_held_out_leave_the_documentation_of_packages(
    installed_package: str, tmp_path: Path
) -> None:
    (tmp_path / "asked.txt").write_text("Write a function to add one to the number\n")
    options = ReadOptions(code="requests", include=("*.py", "*.md"), held_out=tmp_path / "asked.txt")
    source = open_source(installed_package, options)
    assert {document.group for document in source.documents} == {
        "madeup/docs/guide.md", "madeup/docs/CHANGES.md", "madeup/README.md",
    }  # fmt: skip
    assert source.report.examples[DEFINES] == ["madeup/docs/one.md"]
    with pytest.raises(UserError, match=r"--held-out needs pairs, and --include \*\.md takes no \.py file"):
        open_source(installed_package, dataclasses.replace(options, include=("*.md",)))


def test_patterns_that_choose_nothing_are_one_line(
    command: Command, installed_package: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"no file of the packages fits --include \*\.rst without --exclude a;"
    ):
        open_source(installed_package, ReadOptions(include=("*.rst",), exclude=("a",)))
    with pytest.raises(UserError, match=r"--include \* without --exclude \*\.py;.*such as json/decoder\.py"):
        open_source("stdlib", ReadOptions(exclude=("*.py",)))
    with pytest.raises(UserError, match="choose among files, and a data set of the hub is one"):
        open_source("hub:some/rows", ReadOptions(include=("*.md",)))
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(UserError, match=r"leave one\.txt out, which is all of --source"):
        open_source(str(tmp_path / "one.txt"), ReadOptions(exclude=("*.txt",)))
    arguments = ("--source", "packages:jaxtyping", "--include", "*.md", "--answers-only")
    result = command("jaxgpt", "prepare", *arguments, "--out", tmp_path / "d")
    assert_one_line_error(
        result, "--answers-only needs pairs, and --include takes in none (jaxtyping/", "README.md"
    )


def test_the_versions_of_many_packages_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    found = importlib.metadata.packages_distributions()
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: asked.append(1) or found)
    source = open_source("packages:jaxtyping,tyro,rich")
    assert asked == [1]
    assert [part.split()[0] for part in source.revision.split(", ")] == ["jaxtyping", "tyro", "rich"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("packages:" + ",".join(f"p{n}" for n in range(622)), "packages:p0,p1,p2 and 619 more"),
        (
            "packages:" + ",".join(f"p{n}" for n in range(20)),
            "packages:" + ",".join(f"p{n}" for n in range(20)),
        ),
        ("stdlib", "stdlib"),
    ],
)
def test_a_long_list_of_packages_is_told_in_brief(names: str, shown: str) -> None:
    assert brief(names) == shown


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("packages:no_such_package", ("no_such_package", "not installed")),
        ("packages:__main__", ("__main__", "not installed")),
        ("no/such/path", ("no/such/path", "stdlib")),
        ("stdlibb", ("stdlibb", "offline choices")),
    ],
)
def test_a_source_that_is_not_there_is_one_line_with_the_choices(
    command: Command, tmp_path: Path, source: str, parts: tuple[str, ...]
) -> None:
    assert_one_line_error(command("jaxgpt", "prepare", "--source", source, "--out", tmp_path / "d"), *parts)
    assert not (tmp_path / "d").exists()


def test_wrong_column_names_those_there_are(command: Command, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(5))
    result = command("jaxgpt", "prepare", "--source", path, "--text-column", "body", "--out", tmp_path / "d")
    assert_one_line_error(result, "'body'", "instruction, input, output, text", "--text-column")


def test_damaged_table_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    result = command("jaxgpt", "prepare", "--source", tmp_path / "a.parquet", "--out", tmp_path / "d")
    assert_one_line_error(result, "a.parquet", "no readable parquet table")


def test_a_table_without_a_byte_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    result = command("jaxgpt", "prepare", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "d")
    assert_one_line_error(result, "a.jsonl is empty", "json table")


def test_unreachable_hub_is_one_line_within_seconds(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    # Nothing listens on port 1 of this machine, so the hub is unreachable wherever the test runs.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    started = time.monotonic()
    result = command("jaxgpt", "prepare", "--source", "hub:someone/something", "--out", tmp_path / "d")
    assert time.monotonic() - started < 15
    assert_one_line_error(result, "someone/something", "stdlib", "packages:", "local file")


def test_hub_files_are_chosen_so_that_each_row_comes_once() -> None:
    twice = [".gitattributes", "README.md", "python-codes-25k.json", "python-codes-25k.jsonl"]
    assert choose_data_files(twice, "x") == ["python-codes-25k.jsonl"]
    splits = ["data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet", "extra.json"]
    assert choose_data_files(splits, "x") == ["data/train-0.parquet", "data/train-1.parquet"]
    folders = ["default/test/0000.parquet", "default/train/0000.parquet", "default/validation/0.parquet"]
    assert choose_data_files(folders, "x") == ["default/train/0000.parquet"]
    within = ["training/train.json", "training/test.json", "training/part-0.json", "train/validation.json"]
    assert choose_data_files(within, "x") == ["training/train.json", "training/part-0.json"]
    assert choose_data_files(["trainset.jsonl", "testset.jsonl"], "x") == ["trainset.jsonl"]
    assert choose_data_files(["data.jsonl", "test.jsonl", "my_dev.jsonl"], "x") == ["data.jsonl"]
    assert choose_data_files(["latest.jsonl", "devices.jsonl"], "x") == ["latest.jsonl", "devices.jsonl"]
    assert choose_data_files(["test.jsonl"], "x") == ["test.jsonl"]
    assert choose_data_files(["strained.jsonl", "train25k.jsonl"], "x") == ["train25k.jsonl"]
    with pytest.raises(UserError, match="holds no"):
        choose_data_files(["README.md", "data.csv"], "x")


def test_hub_rows_go_through_datasets_like_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's code on a repository that holds the same rows twice, its file served from this machine."""
    import types

    import huggingface_hub

    from jaxgpt.data import hub

    path = write_jsonl(tmp_path / "python-codes-25k.jsonl", rows(12))
    files = ["python-codes-25k.json", "python-codes-25k.jsonl"]
    info = types.SimpleNamespace(sha="abc123", siblings=[types.SimpleNamespace(rfilename=f) for f in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: info)
    load_table, asked = hub.load_table, []

    def serve(urls: list[str]) -> object:
        asked.extend(urls)
        return load_table([str(path)])

    monkeypatch.setattr(hub, "load_table", serve)
    source = open_source("hub:flytech/python-codes-25k")
    assert [document.text for document in source.documents] == [row["text"] for row in rows(12)]
    assert asked == ["hf://datasets/flytech/python-codes-25k@abc123/python-codes-25k.jsonl"]
    assert source.revision == "abc123"
