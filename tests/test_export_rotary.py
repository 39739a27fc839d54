"""Rotary positions, from the Flax model through the artifact to both quantizations."""

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY_SHAPE, TINY_TRAIN, Command, assert_one_line_error, run_command
from jaxgpt_export import load
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.rotary import rope_table
from jaxgpt_export.model.build import float_model
from jaxgpt_export.model.gpt import rotate as torch_rotate
from jaxgpt_export.model.kv_cache import KVCache
from transformers import AutoModelForCausalLM

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.training.model.attention import rotate
from jaxgpt.training.model.gpt import empty_cache
from jaxgpt.training.model.params import graph_of, init_params, merge

CONFIG = ModelConfig(97, 24, 2, 2, 32, positions="rotary")
FLOAT32_TOLERANCE = 1e-5  # single products and sums of values near 1
# Nats, five times what was measured, 3.4e-6 (dynamic) and 4.2e-6 (static): another processor trains another
# model, which rounding costs about as much.
MAX_KL = 2e-5


def turned(x: np.ndarray, first: int) -> np.ndarray:
    """The formula in complex float64: channel pair i times exp(1j * position * 10000^(-2 i / D))."""
    T, D = x.shape[1], x.shape[3]
    pairs = x[..., : D // 2] + 1j * x[..., D // 2 :]
    for t in range(T):
        for i in range(D // 2):
            angle = (first + t) * 10_000 ** (-2 * i / D)
            pairs[:, t, :, i] *= complex(math.cos(angle), math.sin(angle))
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("first", [0, 7, 1000])
def test_both_sides_turn_as_the_complex_formula(first: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16))
    expected = turned(x, first)
    found = rotate(jnp.asarray(x, jnp.float32), first + jnp.arange(5))
    # The angle itself is rounded: at position 1000 by 1000 * 2^-24.
    tolerance = FLOAT32_TOLERANCE + first * 2.0**-22
    assert np.abs(np.asarray(found) - expected).max() <= tolerance
    table = torch.from_numpy(rope_table(ModelConfig(97, 2048, 1, 2, 32, positions="rotary")))
    cosine, sine = table.narrow(1, first, 5)
    other = torch_rotate(torch.tensor(x, dtype=torch.float32).transpose(1, 2), cosine, sine)
    assert np.abs(other.transpose(1, 2).numpy() - expected).max() <= tolerance


def test_the_table_is_computed_in_blocks_that_change_no_bit() -> None:
    config = ModelConfig(97, 2**15 + 7, 1, 2, 32, positions="rotary")
    tracemalloc.start()
    table = rope_table(config)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    frequencies = 10_000.0 ** (-np.arange(8, dtype=np.float64) / 8)
    angles = np.arange(config.block_size, dtype=np.float64)[:, None] * np.tile(frequencies, 2)
    assert np.array_equal(table, np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))
    assert most < 1.5 * table.nbytes


def test_a_table_that_memory_does_not_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(97, 2**20, 1, 1, 512, positions="rotary")
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        with pytest.raises(
            UserError,
            match=r"context of 1048576 tokens take 4\.3 GB .* is n_positions of its config.json right",
        ):
            rope_table(config)


def test_attention_depends_on_distance_alone() -> None:
    random = np.random.default_rng(1)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(at: int, other: int) -> float:
        return float((rotate(query, jnp.array([at])) * rotate(key, jnp.array([other]))).sum())

    assert score(9, 4) == pytest.approx(score(30, 25), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.slow
def test_cache_continues_at_its_position() -> None:
    params, graph = init_params(CONFIG, 0), graph_of(CONFIG)
    assert "wpe.embedding" not in params
    tokens = np.random.default_rng(2).integers(97, size=(2, 24))
    model = merge(graph, params)
    whole = np.asarray(model(jnp.asarray(tokens)))
    first, cache = model.with_cache(jnp.asarray(tokens[:, :10]), empty_cache(CONFIG, 2))
    second, _ = model.with_cache(jnp.asarray(tokens[:, 10:]), cache)
    assert np.abs(np.concatenate([first, second], axis=1) - whole).max() <= FLOAT32_TOLERANCE
    names = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
    tensors = {}
    for name, array in params.items():
        stem, _, leaf = name.rpartition(".")
        tensor = torch.from_numpy(np.array(array))
        tensors[f"{stem}.{names[leaf]}"] = tensor.t().contiguous() if leaf == "kernel" else tensor
    module, cached = float_model(CONFIG, tensors), KVCache(CONFIG, batch=2)
    ids = torch.from_numpy(tokens)
    parts = [module(ids[:, :10], cached), module(ids[:, 10:11], cached), module(ids[:, 11:], cached)]
    assert np.abs(torch.cat(parts, dim=1).numpy() - whole).max() <= FLOAT32_TOLERANCE


@pytest.fixture(scope="module")
def artifact(work: Path, data: Path) -> Path:
    given = ("--data", data, "--out", work / "rotary", "--positions", "rotary", "--cpu-devices", 2)
    assert run_command("jaxgpt", "train", "tiny", *given, *TINY_SHAPE, *TINY_TRAIN) == 0
    out = work / "rotary-fp32"
    assert run_command("jaxgpt-export", "convert", "--run", work / "rotary", "--out", out) == 0
    return out


@pytest.mark.parametrize("method", ["int8-dynamic", pytest.param("int8-static", marks=pytest.mark.slow)])
def test_every_artifact_is_near_flax_and_generates(
    command: Command, artifact: Path, data: Path, tmp_path: Path, method: str
) -> None:
    code, out, _ = command("jaxgpt-export", "verify", "--artifact", artifact, "--json")
    assert code == 0
    assert json.loads(out)["parity"]["max_abs_logit_diff"] <= 1e-4
    arguments = ("--artifact", artifact, "--method", method, "--data", data, "--out", tmp_path / "q")
    assert command("jaxgpt-export", "quantize", *arguments)[0] == 0
    code, out, _ = command("jaxgpt-export", "verify", "--artifact", tmp_path / "q", "--json")
    assert code == 0
    assert json.loads(out)["parity"]["kl_mean"] <= MAX_KL
    assert read_artifact(tmp_path / "q").config.positions == "rotary"
    generated = ("generate", "--artifact", tmp_path / "q", "--prompt", "def", "--max-new-tokens", 8)
    code, out, _ = command("jaxgpt-export", *generated)
    assert code == 0
    assert out.strip()


def test_others_refuse_it_instead_of_reading_it_wrongly(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jaxgpt_gpt2"):
        AutoModelForCausalLM.from_pretrained(artifact)
    # Called a GPT-2 by hand, it is refused by us: the file has no positions.
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "gpt2"
    del config["positions"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing tensors: transformer\.wpe\.weight"):
        load(tmp_path)


def test_an_odd_head_size_is_one_line(command: Command, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="even head size"):
        dataclasses.replace(CONFIG, n_embd=6)
    given = ("--data", data, "--out", tmp_path / "r", "--positions", "rotary", "--n-embd", 6, "--n-head", 2)
    assert_one_line_error(command("jaxgpt", "train", "tiny", *given), "even head size")
