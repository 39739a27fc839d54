"""What commands write into: an --out that can't be written is said first, a full disk in one line."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.parity.comparison import compare_models
from jaxgpt_export.parity.models import open_model

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import only_writer

MISSING = ("--artifact", "missing")
# Every command with an --out, and inputs that are not there: what it says of --out comes first.
WRITERS: dict[str, tuple[object, ...]] = {
    "jaxgpt-export convert": ("--run", "missing"),
    "jaxgpt-export import-hf": ("--source", "missing"),
    "jaxgpt-export import-nanogpt": ("--source", "missing", "--tokenizer", "gpt2"),
    "jaxgpt-export quantize": (*MISSING, "--method", "int8-dynamic"),
    "jaxgpt-export gguf": MISSING,
    "jaxgpt-export onnx": MISSING,
    "jaxgpt-export program": MISSING,
    "jaxgpt-bench quality": (*MISSING, "--data", "missing"),
    "jaxgpt-bench outliers": (*MISSING, "--data", "missing"),
    "jaxgpt-bench integers": (*MISSING, "--data", "missing", "--run", "missing"),
    "jaxgpt-bench agreement": (*MISSING, "--data", "missing"),
    "jaxgpt-bench generate": MISSING,
    "jaxgpt-bench native": (*MISSING, "--reference", "missing", "--data", "missing"),
    "jaxgpt-bench report": ("--run", "missing", "--fp32", "x", "--quality", "x", "--speed", "x"),
}
ENDS = {"gguf": ".gguf", "program": ".pt2"}


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_can_not_be_written_is_said_first(command: Command, tmp_path: Path, name: str) -> None:
    program, word = name.split()
    end = ENDS.get(word, "")
    (tmp_path / "file").touch()
    below = tmp_path / "file" / f"out{end}"
    assert_one_line_error(
        command(program, word, *WRITERS[name], "--out", below), f"--out {below} can't be written"
    )
    if word != "report":  # writes into the folder that a link points to
        (tmp_path / "there").mkdir()
        link = tmp_path / f"link{end}"
        link.symlink_to("there")
        result = command(program, word, *WRITERS[name], "--out", link)
        assert_one_line_error(result, f"--out {link} is a symbolic link", "give there")
        assert link.is_symlink()
    result = command(program, word, *WRITERS[name], "--out", f"s3://bucket/out{end}")
    assert_one_line_error(result, f"--out s3://bucket/out{end} is an address", "mount it")
    assert not Path("s3:").exists()


@pytest.mark.parametrize("word", ["convert", "import-hf", "import-nanogpt", "quantize", "onnx"])
def test_a_second_writer_of_a_folder_is_refused(command: Command, tmp_path: Path, word: str) -> None:
    call = (word, *WRITERS[f"jaxgpt-export {word}"], "--out", tmp_path / "out")
    with only_writer(tmp_path / "out"):
        assert_one_line_error(command("jaxgpt-export", *call), f"another process writes {tmp_path / 'out'}")
    assert "another process" not in command("jaxgpt-export", *call)[2]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_with_path_and_bytes_and_leaves_nothing(
    command: Command, run: Path, fp32: Path, int8_dynamic: Path, small_disk: Path
) -> None:
    calls: dict[str, tuple[object, ...]] = {
        "convert": ("--run", run),
        "import-hf": ("--source", fp32),
        "quantize": ("--artifact", fp32, "--method", "int8-weight-only"),
        "gguf": ("--artifact", fp32, "--type", "f32"),
        "program": ("--artifact", int8_dynamic),
    }
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        calls["onnx"] = ("--artifact", fp32)
    for word, inputs in calls.items():
        target = small_disk / f"out{ENDS.get(word, '')}"
        code, _, err = command("jaxgpt-export", word, *inputs, "--out", target)
        last = err.strip().splitlines()[-1]
        assert code == 2, err
        assert last.startswith(f"error: {target}: no space left on the device after "), last
        assert "bytes of it; free some space" in last
        assert "permission" not in err
        assert list(small_disk.iterdir()) == []


def test_data_of_a_larger_vocabulary_is_one_line(fp32: Path, run: Path) -> None:
    V = read_artifact(fp32).config.vocab_size
    beyond = torch.full((1, 8), V)
    for model in (fp32, run):
        with pytest.raises(
            UserError, match=rf"the data holds token {V}, .* has tokens 0 to {V - 1}; give data"
        ):
            compare_models(open_model(model), open_model(fp32), beyond)
