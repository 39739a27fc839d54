"""What is in which split, told from the text by other means; and in batches of any size the same."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, rows, write_jsonl

from jaxgpt.data.stages import finish, overlap, shards
from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt.shared.tokenizer import load_tokenizer

TEMPLATE = ("--template", "{instruction} {input} {output}", "--answers-only")
OPTIONS = ("--tokenizer", "bpe:384", "--val-fraction", 0.2, *TEMPLATE, "--workers", 1)
RUN = 50


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, some of which hold what stands in others."""
    made = rows(120)
    long = [
        {**row, "output": " ".join(each["output"] for each in made[:3]) + row["input"]} for row in made[3:30]
    ]
    return write_jsonl(tmp_path_factory.mktemp("splits") / "rows.jsonl", [*made, *long])


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of that source, in one batch of everything."""
    from conftest import run_command

    out = tmp_path_factory.mktemp("whole") / "d"
    assert run_command("jaxgpt", "prepare", "--source", source, *OPTIONS, "--out", out) == 0
    return out


def documents_of(dataset: Dataset, split: str) -> Iterator[list[int]]:
    tokens = np.asarray(getattr(dataset, split))
    ends = np.flatnonzero(tokens == dataset.vocab_size - 1)
    return (tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(ends))


def test_validation_is_what_shares_no_run_of_50_tokens_with_training(source: Path, whole: Path) -> None:
    dataset, tokenizer = open_dataset(whole), load_tokenizer(whole)
    training = {
        tuple(document[i : i + RUN])
        for document in documents_of(dataset, "train")
        for i in range(len(document) - RUN + 1)
    }
    made = [json.loads(line) for line in source.read_text().splitlines()]
    texts = {f"{row['instruction']} {row['input']} {row['output']}" for row in made}
    split = {
        name: {tokenizer.decode(each) for each in documents_of(dataset, name)} for name in ("train", "val")
    }
    dropped, kept = 0, set()
    for text in texts - split["train"]:
        tokens = tokenizer.encode(text)
        shares = any(tuple(tokens[i : i + RUN]) in training for i in range(len(tokens) - RUN + 1))
        dropped += shares
        if not shares:
            kept.add(text)
    assert split["val"] == kept
    assert dropped == dataset.manifest["counts"]["val_overlapping"] > 3
    assert len(split["train"]) + len(kept) + dropped == len(texts)


def test_batches_of_any_size_give_the_same_files(
    command: Command, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loop over a part's text or tokens goes around many times."""
    monkeypatch.setattr(shards, "_BATCH_BYTES", 3000)
    monkeypatch.setattr(shards, "_TOKENS_AT_ONCE", 20)
    monkeypatch.setattr(overlap, "_TOKENS_AT_ONCE", 1000)
    monkeypatch.setattr(finish, "_TOKENS_AT_ONCE", 1003)
    code, _, err = command("jaxgpt", "prepare", "--source", source, *OPTIONS, "--out", tmp_path / "d")
    assert code == 0, err
    assert open_dataset(tmp_path / "d").manifest["files"] == open_dataset(whole).manifest["files"]


def test_functions_of_a_file_are_all_in_one_split(command: Command, tmp_path: Path) -> None:
    function = 'def f{0}_{1}(x):\n    """Add {1} to the number {0}."""\n    y = x + {1}\n    return y\n\n\n'
    (tmp_path / "p").mkdir()
    for i in range(12):
        code = "".join(function.format(i, j) for j in range(5))
        (tmp_path / "p" / f"m{i}.py").write_text(code)
    options = ("--tokenizer", "bpe:384", "--val-fraction", 0.3, "--out", tmp_path / "d")
    code, _, err = command("jaxgpt", "prepare", "--source", tmp_path / "p", *options)
    assert code == 0, err
    dataset, tokenizer = open_dataset(tmp_path / "d"), load_tokenizer(tmp_path / "d")
    files = {}
    for split in ("train", "val"):
        texts = [tokenizer.decode(document) for document in documents_of(dataset, split)]
        files[split] = {found[1] for text in texts for found in re.finditer(r"def f(\d+)_", text)}
        assert len(texts) == 5 * len(files[split])
    assert files["train"]
    assert files["val"]
    assert not files["train"] & files["val"]


def test_a_data_set_that_is_half_written_has_no_name(
    command: Command, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    call = ("jaxgpt", "prepare", "--source", source, *OPTIONS, "--out", out)

    def interrupted(_: object, folder: Path, *__: object) -> None:
        assert (folder / "train.bin").stat().st_size > 1000
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(finish, "_validation", interrupted)
        assert command(*call)[0] == 130
    assert os.listdir(tmp_path) == []  # of one part there is nothing to go on with
    assert command(*call)[0] == 0
    assert open_dataset(out).manifest["files"] == open_dataset(whole).manifest["files"]
