"""Tokens that others made come in as they are: nanoGPT's .bin, shards of llm.c and modded-nanogpt."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.data.reading import pieces
from jaxgpt.data.stages import finish
from jaxgpt.shared.dataset import open_dataset


def header(count: int, magic: int = 20240520, version: int = 1) -> bytes:
    return np.array([magic, version, count, *[0] * 253], "<i4").tobytes()


def test_tokens_that_are_none_and_options_that_choose_among_texts_are_one_line(
    command: Command, tmp_path: Path
) -> None:
    path, held = tmp_path / "train.bin", tmp_path / "held.txt"
    held.write_text("Write a function to add numbers\n")
    path.write_bytes(header(100) + np.arange(100, dtype="<u2").tobytes())
    call = ("jaxgpt", "prepare", "--source", f"tokens:{path}", "--tokenizer", "gpt2", "--out", tmp_path / "d")
    given = ("--held-out", held, "--include", "*.md")
    assert_one_line_error(command(*call, *given), "holds tokens, no texts: --held-out, --include")
    path.write_bytes(header(0))
    assert_one_line_error(command(*call), "is empty: there is nothing to read in it")


@pytest.mark.parametrize("of_llm_c", [False, True])
def test_tokens_of_others_come_in_as_they_are(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_llm_c: bool
) -> None:
    monkeypatch.setattr(pieces, "LEAST_BYTES", 20_000)
    monkeypatch.setattr(finish, "ONE_FILE_BYTES", 0)
    folder = tmp_path / "in"
    folder.mkdir()
    for split in ("train", "val"):
        content = (data / f"{split}.bin").read_bytes()
        head = header(len(content) // 2) if of_llm_c else b""
        (folder / f"x_{split}_000000.bin").write_bytes(head + content)
    call = ("jaxgpt", "prepare", "--source", f"tokens:{folder}", "--tokenizer", data, "--workers", 1)
    code, _, err = command(*call, "--out", tmp_path / "d")
    assert code == 0, err
    found, expected = open_dataset(tmp_path / "d"), open_dataset(data)
    assert found.manifest["shards"] > 2
    assert (np.asarray(found.train) == expected.train).all()
    assert (found.val == expected.val).all()
    assert found.val_bytes == expected.val_bytes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (header(9) + b"\0" * 16, ("1040 bytes", "9 tokens", "1042")),
        (header(8, version=2) + b"\0" * 16, ("version 2", "expected 1")),
        (header(8, magic=20240801) + b"\0" * 16, ("32-bit tokens",)),
        (b"\1\2\3", ("3 bytes", "2 a token")),
        (np.array([5, 900, 5], "<u2").tobytes(), ("token 900 at 1", "0 to 383")),
    ],
)
def test_tokens_that_are_none_are_one_line(
    command: Command, data: Path, tmp_path: Path, content: bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    call = ("jaxgpt", "prepare", "--source", f"tokens:{tmp_path / 'x.bin'}", "--out", tmp_path / "d")
    assert_one_line_error(command(*call, "--tokenizer", data), "x.bin", *parts)
    assert os.listdir(tmp_path) == ["x.bin"]


def test_tokens_need_the_tokenizer_that_made_them(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0" * 64)
    call = ("jaxgpt", "prepare", "--source", f"tokens:{tmp_path / 'x.bin'}", "--out", tmp_path / "d")
    assert_one_line_error(command(*call, "--tokenizer", "bpe:300"), "holds tokens", "--tokenizer")
    call = ("jaxgpt", "prepare", "--source", f"tokens:{tmp_path / 'y.bin'}", "--out", tmp_path / "d")
    assert_one_line_error(command(*call), "y.bin", "names no file")


def test_the_masks_of_a_data_set_are_no_tokens(command: Command, tmp_path: Path) -> None:
    for name in ("train.bin", "train.mask.bin"):
        (tmp_path / name).write_bytes(np.arange(100, dtype="<u2").tobytes())
    call = (
        "jaxgpt",
        "prepare",
        "--source",
        f"tokens:{tmp_path}",
        "--tokenizer",
        "gpt2",
        "--out",
        tmp_path / "d",
    )
    assert_one_line_error(command(*call), "counts answers alone (train.mask.bin)", "prepare its text again")
