"""What `jaxgpt-export quantize` reads, when it refuses, and what it leaves: on a random model, untrained."""

import dataclasses
import json
import shutil
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error, rows, run_command, write_jsonl
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.format.probe import probe_tokens
from jaxgpt_export.native.library import EngineMemoryError
from jaxgpt_export.quantize import command as quantize_module
from jaxgpt_export.quantize import layer_order
from jaxgpt_export.quantize.layer_order import _sum
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.quantizer import Quantizer
from tiny_artifacts import tiny_artifact

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import load_tokenizer

MANY_TOKENS = 4_000_000  # of a split of which a few windows are used; 8 MB, in int32 windows five times that
FEW_BYTES = 2_000_000  # that those windows take


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 artifact of 32 tokens of context."""
    return tiny_artifact(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def text(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set by its tokenizer."""
    scratch = tmp_path_factory.mktemp("text")
    source = write_jsonl(scratch / "rows.jsonl", rows(30))
    arguments = ("--source", source, "--tokenizer", fp32, "--val-fraction", 0.2, "--out", scratch / "data")
    assert run_command("jaxgpt", "prepare", *arguments) == 0
    return scratch / "data"


def quantize(command: Command, fp32: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return command("jaxgpt-export", "quantize", "--artifact", fp32, "--out", out, *more)


def test_a_validation_split_shorter_than_a_context_is_refused_before_any_rounding(
    command: Command, fp32: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("rounding began")

    short = dataclasses.replace(open_dataset(text), val=np.zeros(32, np.uint16))
    monkeypatch.setattr(quantize_module, "open_dataset", lambda folder: short)
    monkeypatch.setattr(Quantizer, "__init__", none)
    for method in ("int8-dynamic", "auto"):
        found = quantize(command, fp32, tmp_path / "a", "--method", method, "--data", text)
        assert_one_line_error(found, "validation split has 32 tokens", "at least 33", "--val-fraction")
        assert "--block-size" not in found[2]
    assert not (tmp_path / "a").exists()


@pytest.fixture
def most_bytes() -> Iterator[Any]:
    """Tells how many bytes were taken at a time since it was last asked."""
    tracemalloc.start()

    def peak() -> int:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return found

    yield peak
    tracemalloc.stop()


@pytest.mark.parametrize("tokens", [33, 64, 65, 96, 97, 129, 321, 1000])
def test_the_windows_of_a_probe_are_full_ones_evenly_spread(tokens: int) -> None:
    val = np.arange(tokens, dtype=np.uint16)
    inputs, targets = windows(val, 32)
    full = inputs[(targets >= 0).all(axis=1)]
    spread = full[np.linspace(0, len(full) - 1, min(4, len(full))).round().astype(int)]
    found = probe_tokens(val, 32)
    assert found.dtype == np.int32
    assert np.array_equal(found, spread)


def test_of_a_long_validation_split_the_windows_that_are_used_are_made_and_no_others(
    text: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: Any
) -> None:
    val = np.resize(np.arange(300, dtype=np.uint16), MANY_TOKENS)
    dataset = dataclasses.replace(open_dataset(text), val=val)
    before = most_bytes()
    assert probe_tokens(val, 32).shape == (4, 32)
    assert most_bytes() - before < FEW_BYTES
    seen: list[Any] = []

    def measuring(models: object, parts: Iterator[Any]) -> dict[str, str]:
        seen.extend(parts)
        return {"float": "f", "quantized": "q"}

    class Model:
        class config:
            block_size = 32

    monkeypatch.setattr("jaxgpt_export.parity.quality.measure_quality", measuring)
    model: Any = Model()
    assert quantize_module._quality(model, model, dataset) == ("f", "q")
    assert most_bytes() - before < FEW_BYTES
    inputs = np.concatenate([each[0].numpy() for each in seen])
    assert np.array_equal(inputs, val[: quantize_module.QUALITY_TOKENS].reshape(-1, 32))


def test_a_comparison_makes_the_windows_that_it_compares(
    command: Command, fp32: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*arguments: Any) -> Any:
        found = windows(*arguments)
        made.append(len(found[0]))
        return found

    for where in ("jaxgpt.shared.dataset.windows", "jaxgpt.shared.dataset.opening.windows"):
        monkeypatch.setattr(where, counted)
    call = ("compare", "--reference", fp32, "--model", fp32, "--data", text, "--tokens", 64)
    code, _, err = command("jaxgpt-export", *call)
    assert code == 0, err
    assert "on 64 tokens" in err
    assert made == [2]


@pytest.mark.parametrize("method", ["int8-weight-only", "auto"])
def test_a_trial_of_speed_that_fails_leaves_the_artifact_and_no_figure(
    command: Command,
    fp32: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    def full(*_: object) -> float:
        raise EngineMemoryError("out of memory; give it more")

    monkeypatch.setattr("jaxgpt_export.quantize.speed._decode_seconds", full)
    only = [find_method("int8-weight-only")]
    monkeypatch.setattr("jaxgpt_export.quantize.auto.cheapest_first", lambda quantizer: only)
    more = ("--data", text, "--max-loss", 100) if method == "auto" else ()
    code, out, err = quantize(command, fp32, tmp_path / "a", "--method", method, "--json", *more)
    assert code == 0, err
    assert "its speed beside float was not measured: out of memory" in err
    figures = json.loads(out.strip().splitlines()[-1])
    assert not {"speed_against_float", "speed_engine"} & {*figures, *figures.get("tried", [{}])[0]}
    assert len(figures.get("tried", [])) == (method == "auto")
    assert read_artifact(tmp_path / "a").kind == "int8-weight-only"


def test_what_is_no_mistake_of_the_user_ends_the_trial_and_leaves_nothing(
    command: Command, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxgpt_export.quantize.speed._decode_seconds", stopped)
    assert quantize(command, fp32, tmp_path / "a", "--method", "fp16")[0] != 0
    assert not (tmp_path / "a").exists()


def test_an_artifact_names_the_parent_that_was_rounded_whatever_lies_there_by_then(
    command: Command, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may take hours; somebody converts another run into the parent's folder meanwhile."""
    parent = shutil.copytree(fp32, tmp_path / "parent")
    plain = quantize_module._round

    def replaced(*arguments: Any) -> Any:
        found = plain(*arguments)
        for name in ("model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"):
            (parent / name).unlink()
            (parent / name).write_text("of another run")
        return found

    monkeypatch.setattr(quantize_module, "_round", replaced)
    code, _, err = quantize(command, parent, tmp_path / "a", "--method", "fp16")
    assert code == 0, err
    origin = read_certificate(tmp_path / "a")["origin"]
    assert origin["parent_sha256"] == sha256_of(fp32 / "model.safetensors")
    assert load_tokenizer(tmp_path / "a").sha256 == load_tokenizer(fp32).sha256


@pytest.mark.parametrize("channels", [6, 8, 24])
@pytest.mark.parametrize("windows", [1, 15, 16, 17, 33, 300])
def test_the_head_s_moments_are_one_sum_of_all_windows(channels: int, windows: int) -> None:
    """The bits of what PyTorch gives of all of them at once, in one thread as by vectors of any width."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scale = torch.logspace(-3, 3, windows, dtype=torch.float64)[:, None, None]
        parts = scale * torch.randn(
            windows, channels, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        assert torch.equal(_sum(iter(parts), channels), parts.sum(dim=0))
    finally:
        torch.set_num_threads(threads)


def test_few_products_of_the_head_s_inputs_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=50, block_size=8, n_layer=1, n_head=1, n_embd=8)
    alive: set[int] = set()
    most: list[int] = []
    plain = layer_order._product

    def counted(x: torch.Tensor) -> torch.Tensor:
        made = plain(x)
        alive.add(id(made))
        weakref.finalize(made, alive.discard, id(made))
        most.append(len(alive))
        return made

    monkeypatch.setattr(layer_order, "_product", counted)
    tokens = torch.zeros(40, 8, dtype=torch.int32)
    layer_order.round_in_order(config, random_tensors(config), tokens, lambda name, weight, moments: weight)
    assert len(most) == 5 * 40
    assert max(most) <= 3
