import itertools
import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_one_line_error, python, rows, write_jsonl
from waiting import killed_at_end, wait_until

from jaxgpt.data.documents import is_validation, place_in_split
from jaxgpt.data.overlap import HashFilter, document_runs, run_hashes, sharing
from jaxgpt.data.stages.encode import closed
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import load_tokenizer


def documents_of(tokens: np.ndarray, endoftext: int) -> list[list[int]]:
    ends = np.flatnonzero(tokens == endoftext)
    return [tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]


def test_dataset_holds_each_document_once_and_nothing_else(data: Path) -> None:
    dataset, tokenizer = open_dataset(data), load_tokenizer(data)
    found: list[str] = []
    for tokens in (dataset.train, dataset.val):
        assert tokens[0] == tokens[-1] == tokenizer.endoftext
        found += [tokenizer.decode(document) for document in documents_of(tokens, tokenizer.endoftext)]
    counts = dataset.manifest["counts"]
    expected = Counter(row["text"] for row in rows(600))
    assert not Counter(found) - expected
    assert len(found) == 600 - counts["val_overlapping"]
    assert counts["train_documents"] + counts["val_documents"] == len(found)
    assert counts["val_bytes"] == sum(len(text.encode()) for text in found[counts["train_documents"] :])


def test_validation_shares_no_50_tokens_with_training(data: Path) -> None:
    dataset = open_dataset(data)
    endoftext = dataset.vocab_size - 1

    def runs(tokens: np.ndarray) -> set[tuple[int, ...]]:
        return {
            tuple(document[i : i + 50])
            for document in documents_of(tokens, endoftext)
            for i in range(len(document) - 49)
        }

    assert not runs(dataset.train) & runs(dataset.val)


@pytest.mark.parametrize(("shared", "kept"), [(49, [0, 1]), (50, [0]), (80, [0])])
def test_a_document_goes_when_it_shares_50_tokens_and_not_when_49(shared: int, kept: list[int]) -> None:
    random = np.random.default_rng(0)
    train = [random.integers(1000, size=300).astype(np.uint16) for _ in range(3)]
    fresh = random.integers(1000, 2000, size=200).astype(np.uint16)
    copier = np.concatenate([fresh[:30], train[1][100 : 100 + shared], fresh[30:60]])
    val, lengths = closed([fresh, copier], 2000), np.array([len(fresh), len(copier)])
    hashes, documents = document_runs(val, lengths)
    assert np.bincount(documents).tolist() == (lengths - 49).tolist()
    runs = run_hashes(closed(train, 2000))
    passed = np.sort(runs[HashFilter.of([hashes], len(hashes)).may_hold(runs)])
    assert len(passed) < len(runs) // 2
    parts = [sharing(val, lengths, part) for part in np.array_split(passed, 3)]
    assert np.flatnonzero(~np.any(parts, axis=0)).tolist() == kept


def test_run_hashes_are_equal_exactly_where_runs_are() -> None:
    tokens = np.random.default_rng(0).integers(2, size=3000).astype(np.uint16)
    tokens[2000:2060] = tokens[100:160]
    runs = [tuple(tokens[i : i + 50]) for i in range(len(tokens) - 49)]
    hashes = run_hashes(tokens)
    assert len(set(hashes.tolist())) == len(set(runs))
    assert hashes[100] == hashes[2000]
    assert len(run_hashes(tokens[:49])) == 0


def test_duplicates_and_blank_documents_are_counted_and_left_out(command: Command, tmp_path: Path) -> None:
    texts = ["a b", "a b ", "", "  \n", "c", "a b", "half \ud83d pair", *(f"more {i}" for i in range(40))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ("--source", path, "--tokenizer", "bpe:300", "--val-fraction", 0.2, "--out", tmp_path / "d")
    assert command("jaxgpt", "prepare", *arguments)[0] == 0
    dataset, tokenizer = open_dataset(tmp_path / "d"), load_tokenizer(tmp_path / "d")
    found = [
        tokenizer.decode(document)
        for tokens in (dataset.train, dataset.val)
        for document in documents_of(tokens, tokenizer.endoftext)
    ]
    assert sorted(found) == sorted(["a b", "c", "half ? pair", *texts[7:]])
    counts = dataset.manifest["counts"]
    assert {name: counts[name] for name in ("documents_read", "duplicates", "blank")} == {
        "documents_read": 47,
        "duplicates": 2,
        "blank": 2,
    }


def test_a_group_is_never_cut_and_more_data_moves_none() -> None:
    places = np.array([place_in_split(f"file {i // 5}") for i in range(500)], np.uint64)
    assert (places.reshape(100, 5) == places[::5, None]).all()
    val = is_validation(places, 0.2)
    assert val.tolist() == [int(place) / 2**64 < 0.2 for place in places]
    assert 0.1 < val.mean() < 0.3


def test_preparing_again_gives_the_same_bytes(
    command: Command, data: Path, work: Path, tmp_path: Path
) -> None:
    arguments = ("--source", work / "rows.jsonl", "--tokenizer", "bpe:384", "--val-fraction", 0.1)
    assert command("jaxgpt", "prepare", *arguments, "--out", tmp_path / "d", "--threads", 1)[0] == 0
    for name in ("train.bin", "val.bin", "merges.txt", "tokenizer.json", "vocab.json"):
        assert sha256_of(tmp_path / "d" / name) == sha256_of(data / name)


def test_existing_dataset_is_kept_unless_overwritten(command: Command, data: Path, work: Path) -> None:
    before = (data / "manifest.json").read_bytes()
    arguments = ("--source", work / "rows.jsonl", "--tokenizer", "bpe:300", "--out", data)
    assert_one_line_error(command("jaxgpt", "prepare", *arguments), "exists", "--overwrite")
    assert (data / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'])
def test_empty_corpus_is_one_line(command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content if not content else "")
    name = "empty.txt"
    if content:
        (tmp_path / "empty.jsonl").write_text(content)
        name = "empty.jsonl"
    result = command("jaxgpt", "prepare", "--source", tmp_path / name, "--out", tmp_path / "d")
    assert_one_line_error(result, name, "is empty")
    assert not (tmp_path / "d").exists()


def test_one_document_can_not_be_split(command: Command, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", rows(1))
    arguments = ("--source", path, "--tokenizer", "bpe:300", "--out", tmp_path / "d")
    assert_one_line_error(command("jaxgpt", "prepare", *arguments), "1 documents", "more text")


def test_an_interrupted_prepare_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    out = tmp_path / "d"
    options = ["prepare", "--source", "stdlib", "--tokenizer", "bpe:600", "--out", str(out)]
    code = f"from jaxgpt.cli import main; main({options!r})"
    arguments, environment = python(code)
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    with killed_at_end(process):
        wait_until(lambda: os.listdir(tmp_path) or process.poll() is not None, "what it begins with")
        time.sleep(1.0)
    if out.exists():  # it was faster than the kill: then it is whole
        assert open_dataset(out).manifest["counts"]["train_documents"] > 100
    else:
        left = os.listdir(tmp_path)
        assert left
        assert all(name.startswith(".d.tmp-") for name in left)


def test_manifest_says_where_the_text_came_from(data: Path, work: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["source"] == str(work / "rows.jsonl")
    assert manifest["tokenizer"]["name"] == "bpe:384"
    assert manifest["tokenizer"]["vocab_size"] == 384
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (data / name).stat().st_size, "sha256": sha256_of(data / name)}
