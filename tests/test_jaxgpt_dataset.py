import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.shared.dataset import checked_files, count_windows, open_dataset, pack_mask, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.training.batches import Batches


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def test_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jaxgpt prepare"):
        open_dataset(tmp_path / "nothing")


def test_a_file_in_place_of_a_folder_is_named_so(copy: Path, fp32: Path, command: Command) -> None:
    file = copy / "manifest.json"
    for arguments in (("train", "tiny", "--data", file, "--out", copy / "r"), ("evaluate", "--run", file)):
        assert_one_line_error(command("jaxgpt", *arguments), f"{file} is a file, expected a")
    assert_one_line_error(command("jaxgpt", "evaluate", "--run", fp32), "is an artifact", "expected a run")


def test_truncated_tokens_are_noticed(copy: Path) -> None:
    content = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"holds {len(content) - 2} bytes, its manifest says {len(content)}"):
        open_dataset(copy)


def test_one_flipped_bit_is_noticed(copy: Path) -> None:
    content = bytearray((copy / "val.bin").read_bytes())
    content[100] ^= 1
    (copy / "val.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"val\.bin has sha256"):
        open_dataset(copy)


def test_missing_file_is_named(copy: Path) -> None:
    (copy / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin is missing"):
        open_dataset(copy)


def test_manifest_of_another_version_or_without_a_field_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        open_dataset(copy)
    del manifest["tokenizer"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="tokenizer"):
        open_dataset(copy)


@pytest.mark.parametrize("length", [9, 16, 17, 33, 40])
def test_windows_predict_every_token_but_the_first_exactly_once(length: int) -> None:
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    inputs, targets = windows(tokens, 8)
    counted = targets >= 0
    assert targets[counted].tolist() == tokens[1:].tolist()
    assert (inputs[counted] + 1 == targets[counted]).all()
    assert inputs.min() >= 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [9, 33, 40, 41])
def test_windows_cut_a_few_at_a_time_are_those_cut_at_once(length: int, masked: bool) -> None:
    """Of the tokens and the mask no more is read than they hold."""
    draw = np.random.default_rng(length)
    tokens = draw.integers(0, 500, length, dtype=np.uint16)
    mask = pack_mask(draw.random(length) < 0.5) if masked else None
    whole, count = windows(tokens, 8, mask), count_windows(tokens, 8)
    assert [array.shape for array in whole] == [(count, 8)] * 2
    for rows in (1, 2, 3, 7):
        parts = [windows(tokens, 8, mask, first, first + rows) for first in range(0, count, rows)]
        assert max(len(inputs) for inputs, _ in parts) == min(rows, count)
        for number, expected in enumerate(whole):
            assert np.array_equal(np.concatenate([part[number] for part in parts]), expected)


def test_split_without_a_full_window_is_refused() -> None:
    with pytest.raises(UserError, match="has 8 tokens, one window needs block_size \\+ 1 = 9"):
        windows(np.zeros(8, np.uint16), 8)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("tokenizer", "vocab_size", "abc"),
        ("tokenizer", "vocab_size", 10),
        ("tokenizer", "name", None),
        ("counts", "val_bytes", 0),
        ("files", "val.bin", {"bytes": "x"}),
    ],
)
def test_a_damaged_manifest_is_said_to_be(copy: Path, section: str, name: str, value: object) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest[section][name] = value
    if value is None:
        del manifest[section][name]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        open_dataset(copy)


def test_what_was_checked_is_read_once_and_again_when_it_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    check = checked_files._check
    monkeypatch.setattr(checked_files, "SETTLED_NS", 0)
    monkeypatch.setattr(checked_files, "_check", lambda path: read.append(path.name) or check(path))
    open_dataset(copy)
    assert sorted(read) == ["train.bin", "val.bin"]
    open_dataset(copy)
    assert len(read) == 2
    os.utime(copy / "val.bin")
    open_dataset(copy)
    assert read[2:] == ["val.bin"]


@pytest.fixture(params=[False, True])
def shards(request: pytest.FixtureRequest, copy: Path) -> tuple[Path, np.ndarray, np.ndarray | None]:
    """A data set whose training split was cut into five files, one of them empty; its tokens and mask."""
    tokens = np.fromfile(copy / "train.bin", np.uint16)
    val = np.fromfile(copy / "val.bin", np.uint16)
    manifest = json.loads((copy / "manifest.json").read_text())
    cuts = [0, 1000, 1000, 1013, 9000, len(tokens)]
    counts = np.random.default_rng(0).integers(2, size=len(tokens)).astype(bool) if request.param else None
    contents: dict[str, np.ndarray] = {"val.bin": val}
    for i in range(5):
        contents[f"train-{i:05d}.bin"] = tokens[cuts[i] : cuts[i + 1]]
        if counts is not None:
            contents[f"train-{i:05d}.mask.bin"] = pack_mask(counts[cuts[i] : cuts[i + 1]])
    if counts is not None:
        contents["val.mask.bin"] = pack_mask(np.ones(len(val), bool))
        manifest["counts"]["val_answer_bytes"] = 1
    manifest |= {"format_version": 3, "shards": 5, "files": {}}
    for name, content in contents.items():
        content.tofile(copy / name)
        manifest["files"][name] = {"bytes": content.nbytes, "sha256": sha256_of(copy / name)}
    (copy / "train.bin").unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy, tokens, counts


def test_shards_give_the_batches_of_one_file(shards: tuple[Path, np.ndarray, np.ndarray | None]) -> None:
    folder, tokens, counts = shards
    dataset = open_dataset(folder)
    assert (np.asarray(dataset.train) == tokens).all()
    assert len(dataset.train[990:1020]) == 30
    mask = None if counts is None else pack_mask(counts)
    one = Batches(tokens, 64, 4, 0, mask)
    several = Batches(dataset.train, 64, 4, 0, dataset.train_mask)
    for step in range(2 * one.windows_per_epoch // 4):
        for expected, found in zip(one.at(step), several.at(step), strict=True):
            assert (expected == found).all()
