import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def test_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jaxgpt prepare"):
        open_dataset(tmp_path / "nothing")


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
