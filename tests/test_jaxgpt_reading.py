"""Texts of every kind come in, what does not is named, and pairs may count their answers alone."""

import bz2
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command, assert_one_line_error, rows, write_jsonl

from jaxgpt.data.docstring_pairs import pairs_of_source
from jaxgpt.data.documents import Document, cut_at_endoftext, place_in_split, working_fraction
from jaxgpt.data.reading.columns import Columns
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.shared.dataset import counted, open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import only_writer
from jaxgpt.shared.tokenizer import ENDOFTEXT, Tokenizer, load_tokenizer
from jaxgpt.training.batches import Batches

TEXTS = [f"Document {i} of a few words: {'alpha beta gamma delta '[: i % 20]}" for i in range(40)]
FUNCTION = 'def f(x):\n    """Add one to the number."""\n    y = x + 1\n    return y\n'


def texts(source: Path, **options: object) -> list[str]:
    return [each.text for each in open_source(str(source), ReadOptions(**options)).documents]  # type: ignore[arg-type]


def lines_of(values: list[str]) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def csv_of(values: list[str], separator: str = ",") -> str:
    return f"id{separator}text\n" + "".join(f'{i}{separator}"{text}"\n' for i, text in enumerate(values))


def zstandard(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", lines_of(TEXTS).encode()),
        ("a.JSONL", b"\xef\xbb\xbf\n" + lines_of(TEXTS).encode()),
        ("a.json", json.dumps(TEXTS).encode()),
        ("a.json", json.dumps({"n": list(range(40)), "text": TEXTS}, indent=1).encode()),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.json", lines_of(TEXTS).encode()),
        ("a.csv", csv_of(TEXTS).replace("\n", "\r\n").encode()),
        ("a.csv", csv_of(TEXTS, ";").encode()),
        ("a.tsv", b"\xef\xbb\xbf" + csv_of(TEXTS, "\t").encode()),
        ("a.jsonl.gz", gzip.compress(lines_of(TEXTS).encode())),
        ("a.csv.xz", lzma.compress(csv_of(TEXTS).encode())),
        ("a.jsonl.bz2", bz2.compress(lines_of(TEXTS).encode())),
        ("a.jsonl.zst", zstandard(lines_of(TEXTS).encode())),
        ("a.TXT", ENDOFTEXT.join(TEXTS).encode()),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + ENDOFTEXT.join(TEXTS).encode())),
    ],
)
def test_each_format_gives_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == TEXTS


def test_folders_of_the_hub_and_of_save_to_disk_are_read(tmp_path: Path) -> None:
    clone, disk = tmp_path / "clone", tmp_path / "disk"
    (clone / "data").mkdir(parents=True)
    disk.mkdir()
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode(), "n": list(range(40))})
    pq.write_table(table, clone / "data" / "train.parquet")
    (clone / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (clone / "README.md").write_text("# card")
    with pa.ipc.new_stream(str(disk / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (disk / "state.json").write_text("{}")
    assert texts(clone) == texts(disk) == TEXTS


@pytest.mark.parametrize(
    ("first", "last"), [(None, {"stars": 3}), (1, "x1"), ("2020-01-02", "unknown"), ([], ["a"])]
)
def test_other_columns_may_change_their_type(tmp_path: Path, first: object, last: object) -> None:
    made = [{"text": "one", "other": first}, {"text": "2020-01-02", "other": last}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    assert texts(path) == ["one", "2020-01-02"]


@pytest.mark.parametrize("separator", [" \n \n ", "\n", " "])
def test_a_lone_text_without_blank_lines_is_cut_at_what_it_has(tmp_path: Path, separator: str) -> None:
    words = [f"w{i}x" * 20 for i in range(300)]
    (tmp_path / "a.md").write_text(separator.join(words))
    documents = texts(tmp_path / "a.md")
    assert len(documents) > 5
    assert max(map(len, documents)) < 2200
    assert " ".join(documents).split() == words


def test_endoftext_separates_documents_in_tables_too() -> None:
    text = f"question answer{ENDOFTEXT} \n{ENDOFTEXT}next"
    assert list(cut_at_endoftext(Document(text, text, 9))) == [
        Document("question answer", "question answer", 9),
        Document("next", "next", 0),
    ]


LATIN = ["caf\xe9 and more words"] * 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.txt", "\n\n".join(LATIN).encode("latin-1"), "not UTF-8"),
        ("b.rst", "\n\n".join(LATIN).encode("utf-16"), "UTF-16"),
        ("b.md", "\n\n".join(LATIN).encode("utf-16-le"), "binary"),
        ("b.jsonl", f'{{"text": "{LATIN[0]}"}}\n'.encode("latin-1"), "not UTF-8"),
        ("b.jsonl", b'{"text": "cut\n', "no JSON"),
        ("b.jsonl", b"3\n", "no JSON object"),
        ("b.jsonl", b'{"text": 3}\n', "no text"),
        ("b.csv", csv_of(LATIN).encode("latin-1"), ".csv files"),
        ("b.csv", b"id,text\n1,a,b\n", "number of values"),
        ("b.jsonl.gz", b"no gzip", "damaged"),
        ("b.jsonl.xz", lzma.compress(lines_of(TEXTS).encode())[:-20], "damaged"),
        ("b.txt.zst", zstandard(b"words " * 1000)[:-9], "damaged"),
        ("b.parquet", b"PAR1 not really", ".parquet files"),
    ],
)
def test_what_is_damaged_is_one_line_or_left_out_and_named(
    command: Command, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(60))
    (tmp_path / "in" / name).write_bytes(content)
    call = ("jaxgpt", "prepare", "--tokenizer", "bpe:300", "--val-fraction", 0.2, "--out", tmp_path / "d")
    source = ("--source", tmp_path / "in")
    assert_one_line_error(command(*call, *source), name)
    assert not (tmp_path / "d").exists()
    code, out, err = command(*call, *source, "--skip-errors", "--json")
    assert code == 0
    (left_out,) = json.loads(out)["left_out"].items()
    assert reason in left_out[0]
    assert name in left_out[1]["first"][0]
    assert f"left out: 1 {left_out[0]}" in err
    assert open_dataset(tmp_path / "d").manifest["counts"]["documents_read"] == 60


def test_texts_that_are_not_utf_8_in_a_parquet_are_named(tmp_path: Path) -> None:
    raw = pa.array([text.encode("latin-1") for text in LATIN], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 0 is not UTF-8"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", skip_errors=True) == []


@pytest.mark.parametrize("last", [{"text": None}, {"id": 1}])
def test_rows_without_text_are_counted_and_left_out(tmp_path: Path, last: dict[str, object]) -> None:
    made: list[dict[str, object]] = [{"text": text} for text in TEXTS]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [*made, last])))
    source = open_source(str(path))
    assert [document.text for document in source.documents] == TEXTS
    assert source.report.lines() == [f"left out: 1 rows without text ({path} line 41)"]


def test_the_column_of_a_csv_is_named_or_guessed_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('title,body,n\nA,"a long body, with a comma",1\nB,another body,2\n')
    source = open_source(str(path))
    assert [document.text for document in source.documents] == ["a long body, with a comma", "another body"]
    assert "column 'body', which has the most text" in source.report.lines()[0]
    assert texts(path, text_column="title") == ["A", "B"]
    with pytest.raises(UserError, match="no column 'page'; it has title, body, n"):
        texts(path, text_column="page")


def test_a_template_joins_columns_and_knows_where_the_answer_begins() -> None:
    columns = Columns.of_template(r"{q}\n{{{more}}} {a}!")
    (found,) = columns.documents({"q": "Why?", "more": None, "a": "So"})
    assert found.text == "Why?\n{} So!"
    assert found.answer is not None
    assert found.text[found.answer :] == "So!"
    assert list(columns.documents({"q": "Why?", "a": None})) == []
    assert list(columns.documents({"q": "Why?", "a": " \n"})) == []


@pytest.mark.parametrize("template", ["no column", "{a", "{a:>3}", "{}", "{a!r}"])
def test_a_template_that_is_none_is_one_line(command: Command, tmp_path: Path, template: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    result = command("jaxgpt", "prepare", "--source", path, "--template", template, "--out", tmp_path / "d")
    assert_one_line_error(result, "--template", template, "{NAME}" if template != "{a" else "'}'")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as people have it: code, pages, settings, pictures, an earlier data set."""
    files: dict[str, str] = {
        "src/a.py": FUNCTION,
        "src/b.rs": "fn main() {}",
        "src/broken.py": "def f(:",
        "docs/page.md": "# A page",
        "docs/notes.rst": "Notes",
        "Makefile": "all:\n",
        "package.json": '{"name": "x", "files": ["a"]}',
        "settings.yaml": "a: 1",
        "tests/test_a.py": FUNCTION,
        ".git/config": "x",
        "data/manifest.json": "{}",
        "data/val.bin": "",
        "data/vocab.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(content)
    return tmp_path / "p"


def test_a_project_is_read_and_the_rest_is_named(project: Path) -> None:
    source = open_source(str(project))
    groups = [document.group for document in source.documents]
    assert groups == ["Makefile", "docs/notes.rst", "docs/page.md", "src/a.py", "src/b.rs"]
    assert source.report.skipped == {
        "folders that are hidden, tests or installed packages": 2,
        "data sets of jaxgpt prepare": 1,
        ".yaml files": 1,
        ".json files that are no table with text": 1,
        ".py files that do not parse": 1,
    }
    assert "of 0.1 KB of Python, 0.1 KB are taken" in source.report.lines()[-1]
    assert "--code files" in source.report.lines()[-1]


def test_patterns_choose_files_of_any_kind(project: Path) -> None:
    assert texts(project, include=("*.yaml", "docs/*"), exclude=("*.rst",)) == ["# A page", "a: 1"]
    assert texts(project / "src", code="files") == [FUNCTION, "fn main() {}", "def f(:"]
    with pytest.raises(UserError, match=r"holds no file to read.* 1 \.yaml files"):
        texts(project, exclude=("*.py", "*.md", "*.rst", "*.rs", "*.json", "Makefile"))
    with pytest.raises(UserError, match=r"--include 'settings\.yaml' reads it"):
        texts(project / "settings.yaml")


def test_a_split_that_is_empty_says_which_fraction_works(command: Command, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(12))
    call = ("jaxgpt", "prepare", "--source", path, "--tokenizer", "bpe:300", "--out", tmp_path / "d")
    result = command(*call, "--val-fraction", 0.0001)
    assert_one_line_error(result, "12 documents", "0 for validation", "--val-fraction")
    fraction = result[2].split("--val-fraction ")[1].split(",")[0]
    assert command(*call, "--val-fraction", fraction)[0] == 0


@pytest.mark.parametrize("count", range(1, 40))
def test_the_fraction_that_is_said_leaves_both_splits_some(count: int) -> None:
    places = [place_in_split(f"{count} {i}") / 2**64 for i in range(count)]
    fraction = working_fraction(min(places), max(places))
    assert (fraction is None) == (count == 1)
    assert fraction is None or min(places) < fraction <= max(places)


def test_a_second_writer_of_a_folder_is_refused(command: Command, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(60))
    call = ("jaxgpt", "prepare", "--source", path, "--tokenizer", "bpe:300", "--val-fraction", 0.2)
    with only_writer(tmp_path / "d"):
        result = command(*call, "--out", tmp_path / "d")
        assert_one_line_error(result, "another process writes", "/d")
        assert command(*call, "--out", tmp_path / "e")[0] == 0
    assert command(*call, "--out", tmp_path / "d")[0] == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "d", "e"]


Prepare = Callable[..., Path]


@pytest.fixture
def prepared(command: Command, tmp_path: Path) -> Prepare:
    """Prepare a source with a small tokenizer."""

    def call(source: object, *more: object) -> Path:
        arguments = ("--source", source, "--tokenizer", "bpe:384", "--val-fraction", 0.2, "--overwrite")
        code, _, err = command("jaxgpt", "prepare", *arguments, "--out", tmp_path / "d", *more)
        assert code == 0, err
        return tmp_path / "d"

    return call


def answers_in(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Return the texts before each <|endoftext|>; the first token of an answer holds the space before it."""
    ends = [-1, *(i for i, token in enumerate(tokens) if token == tokenizer.endoftext)]
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(ends)]


def test_of_pairs_the_loss_counts_the_answers_alone(prepared: Prepare, tmp_path: Path) -> None:
    made = rows(80)
    path = write_jsonl(tmp_path / "a.jsonl", made)
    folder = prepared(path, "--template", "{instruction} {input} {output}", "--answers-only")
    dataset, tokenizer = open_dataset(folder), load_tokenizer(folder)
    (inputs, targets), (_, everything) = dataset.val_windows(16), windows(dataset.val, 16)
    assert ((targets == everything) | (targets == -1)).all()
    counted = targets[targets >= 0].tolist()
    assert 0 < len(counted) == dataset.val_targets < len(dataset.val) - 1
    answers = answers_in(counted, tokenizer)
    assert len(answers) == dataset.manifest["counts"]["val_documents"]
    assert {answer.strip() for answer in answers} <= {row["output"] for row in made}
    assert dataset.val_bytes == sum(len(answer.strip()) for answer in answers)
    assert inputs.shape == targets.shape


def test_batches_count_the_answers_alone_and_are_what_they_were_otherwise(
    prepared: Prepare, tmp_path: Path
) -> None:
    made = rows(80)
    path = write_jsonl(tmp_path / "a.jsonl", made)
    template = ("--template", "{instruction} {input} {output}")
    plain = open_dataset(prepared(path, *template))
    tokens = np.array(plain.train)
    assert plain.train_mask is None
    folder = prepared(path, *template, "--answers-only")
    masked = open_dataset(folder)
    assert (masked.train == tokens).all()
    assert masked.train_mask is not None
    answers = answers_in(tokens[counted(masked.train_mask, 0, len(tokens))].tolist(), load_tokenizer(folder))
    assert len(answers) == masked.manifest["counts"]["train_documents"]
    assert {answer.strip() for answer in answers} <= {row["output"] for row in made}
    before, after = Batches(tokens, 16, 4, 0), Batches(masked.train, 16, 4, 0, masked.train_mask)
    seen = 0
    for step in range(before.windows_per_epoch // 4):
        (inputs, targets), (same, chosen) = before.at(step), after.at(step)
        assert (inputs == same).all()
        assert ((chosen == targets) | (chosen == -1)).all()
        seen += (chosen >= 0).sum()
    assert 0.3 < seen / len(tokens) < 0.9


def test_docstring_pairs_count_their_code_alone(prepared: Prepare, tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"m{i}.py").write_text(FUNCTION.replace("one", f"{i} and {i * 7}"))
    folder = prepared(tmp_path / "p", "--answers-only")
    dataset, tokenizer = open_dataset(folder), load_tokenizer(folder)
    _, targets = dataset.val_windows(16)
    answers = answers_in(targets[targets >= 0].tolist(), tokenizer)
    (pair,) = pairs_of_source(FUNCTION)
    assert {answer.strip() for answer in answers} == {pair.output}


def test_documentation_beside_pairs_counts_as_a_whole(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = []
    (package := tmp_path / "site" / "madeup").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for i in range(20):
        (package / f"m{i}.py").write_text(FUNCTION.replace("one", f"{i} and {i * 7}"))
        pages.append(f"# How to add {i}\n\nFirst one number, then {i} more of them.")
        (package / f"page{i}.md").write_text(pages[-1])
    monkeypatch.syspath_prepend(package.parent)
    folder = prepared("packages:madeup", "--answers-only", "--include", "*.py", "*.md", "--workers", 1)
    dataset, tokenizer = open_dataset(folder), load_tokenizer(folder)
    tokens = np.array(dataset.train)
    assert dataset.train_mask is not None
    counts = counted(dataset.train_mask, 0, len(tokens))
    documents = answers_in(tokens.tolist(), tokenizer)
    answers = answers_in(tokens[counts].tolist(), tokenizer)
    found = {text for text in documents if text.startswith("#")}
    assert len(found) > 5
    assert found <= set(pages)
    (pair,) = pairs_of_source(FUNCTION)
    assert {answer.strip() for answer in answers} == {pair.output, *found}


def test_answers_only_of_plain_text_is_one_line(command: Command, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(60))
    call = ("jaxgpt", "prepare", "--source", path, "--val-fraction", 0.2, "--out", tmp_path / "d")
    assert_one_line_error(command(*call, "--answers-only"), "--answers-only needs pairs", "--template")


def test_a_mask_that_is_cut_or_altered_is_noticed(prepared: Prepare, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(60))
    folder = prepared(path, "--template", "{instruction} {output}", "--answers-only")
    mask = folder / "train.mask.bin"
    content = mask.read_bytes()
    for damaged in (content[:-1], bytes([content[0] ^ 8]) + content[1:]):
        mask.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.mask\.bin"):
            open_dataset(folder)
