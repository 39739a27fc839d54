"""Files that an earlier version wrote are read by this one: data, run, artifacts.

older_release.tar.xz was written by commit e17248e of 2026-11-25, before formats, names of methods and of
settings changed: by `jaxgpt prepare` and `train`, `jaxgpt-export convert`, `quantize` and `generate`.
Each artifact holds a probe, logits that that version computed, which `verify` compares.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from jaxgpt_export.native.library import instruction_sets
from safetensors.numpy import load_file

from jaxgpt.shared.dataset import open_dataset

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
ARCHIVE = Path(__file__).with_name("older_release.tar.xz")
# As the methods were called, and are today.
ARTIFACTS = {
    "fp32": "fp32",
    "dynamic": "int8-dynamic",
    "static": "int8-static",
    "weight-only-int4-head": "int4-weight-only-head",
}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an earlier version's files."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def figures(result: tuple[int, str, str]) -> dict[str, Any]:
    """What a command printed with --json."""
    code, out, err = result
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_data_and_run_are_read_and_the_loss_is_that_of_its_time(command: Command, older: Path) -> None:
    dataset = open_dataset(older / "data")
    assert (len(dataset.train), len(dataset.val)) == (12_268, 1_503)
    summary = json.loads((older / "run" / "summary.json").read_text())
    found = figures(command("jaxgpt", "evaluate", "--run", older / "run", "--data", older / "data", "--json"))
    # Sums in float32 in another order, over 1,503 tokens.
    assert found["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-5)


def test_a_run_is_converted_to_the_same_bits(command: Command, older: Path, tmp_path: Path) -> None:
    arguments = ("--run", older / "run", "--data", older / "data", "--out", tmp_path / "fp32")
    assert command("jaxgpt-export", "convert", *arguments)[0] == 0
    was, now = (load_file(folder / "fp32" / "model.safetensors") for folder in (older, tmp_path))
    assert was.keys() == now.keys()
    assert all(np.array_equal(was[name], now[name]) and was[name].dtype == now[name].dtype for name in was)


def test_a_run_begins_another_training(command: Command, older: Path, tmp_path: Path) -> None:
    arguments = ("--data", older / "data", "--init", older / "run", "--out", tmp_path / "run")
    settings = ("--max-steps", 2, "--eval-every", 2, "--batch-size", 8, "--learning-rate", 1e-4,
                "--embedding-learning-rate", 1e-4, "--warmup-steps", 1, "--sample-every", 0)  # fmt: skip
    found = figures(command("jaxgpt", "train", "tiny", *arguments, *settings, "--json"))
    before = json.loads((older / "run" / "summary.json").read_text())["val_loss"]
    assert found["val_loss"] == pytest.approx(before, abs=0.05)  # an untrained model has 5.7


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_gives_the_logits_that_it_gave(
    command: Command, older: Path, tmp_path: Path, name: str
) -> None:
    artifact = shutil.copytree(older / name, tmp_path / name)
    found = figures(command("jaxgpt-export", "verify", "--artifact", artifact, "--json"))
    assert found["kind"] == ARTIFACTS[name]


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=needs_engine)])
def test_an_artifact_gives_the_text_that_it_gave(
    command: Command, older: Path, tmp_path: Path, engine: str, name: str
) -> None:
    artifact = shutil.copytree(older / name, tmp_path / name)
    expected = json.loads((older / "expected.json").read_text())
    arguments = ("--artifact", artifact, "--prompt", expected["prompt"], "--temperature", 0)
    more = ("--max-new-tokens", 24, "--engine", engine, "--json")
    text = figures(command("jaxgpt-export", "generate", *arguments, *more))
    assert text["tokens"] == expected["tokens"][name]
