"""Checkpoints of trainers like nanoGPT: other names, prefixes, objects beside the weights; llm.c."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Command, assert_one_line_error, rows
from jaxgpt_export.interchange.weights.inert_pickle import StandIn, attributes, load_inert
from jaxgpt_export.interchange.weights.nanogpt_checkpoint import read_nanogpt
from jaxgpt_export.interchange.weights.weight_files import read_weights
from jaxgpt_export.model.build import load
from torch import Tensor

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

FLOAT32_TOLERANCE = 1e-5  # two orders of float32 sums, on logits of size 1
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32}
PADDED = 384  # rows of llm.c's vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE."""
    return make_tokenizer("bpe:300", [row["text"] for row in rows(40)])


@pytest.fixture(scope="module")
def model() -> transformers.GPT2LMHeadModel:
    """A small random model of transformers."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, initializer_range=0.2, **SHAPE)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def state(model: transformers.GPT2LMHeadModel) -> dict[str, Tensor]:
    """Its tensors in nanoGPT's layout."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        name: tensor.t().contiguous() if name.endswith(ends) else tensor
        for name, tensor in model.state_dict().items()
    }


@dataclasses.dataclass
class GPTConfig:
    """What build-nanogpt pickles beside its weights."""

    block_size: int = 16
    vocab_size: int = 300
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32


class Surprise:
    """What a pickle must not bring along."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("surprise",))


class Planted:
    """The same through a function of no operating system's module."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (np.savetxt, ("surprise", [1]))  # type: ignore[return-value]


ARGS = {**SHAPE, "block_size": 16, "vocab_size": 300, "bias": True, "dropout": 0.0}


@pytest.mark.parametrize(
    "beside",
    [
        {"config": GPTConfig(), "step": 1, "val_loss": 3.0},
        {"model_args": ARGS, "args": argparse.Namespace(lr=1.0, out=Path("x"))},
        {"model_args": {**ARGS, "n_head": np.int64(4)}, "best_val_loss": np.float64(2.0)},
        {"model_args": argparse.Namespace(**ARGS)},
        {"model_args": ARGS, "hook": Planted()},
    ],
    ids=["config-object", "namespace", "numpy-scalars", "arguments-object", "planted"],
)
def test_objects_beside_the_weights_are_read_as_inert_stand_ins(
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beside: dict[str, object],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, **beside}, "c.pt")
    read = read_nanogpt(Path("c.pt"), tokenizer, None)
    assert read.config.n_head == 4
    np.testing.assert_array_equal(
        read.tensors["h.1.mlp.c_fc.weight"], state["transformer.h.1.mlp.c_fc.weight"].numpy()
    )
    assert not Path("surprise").exists()


def test_a_stand_in_keeps_what_the_file_says_and_is_of_no_class_of_it(tmp_path: Path) -> None:
    torch.save([GPTConfig(n_head=8), np.float32(0.5), Path("a/b")], tmp_path / "c.pt")
    config, scalar, path = load_inert(tmp_path / "c.pt")
    assert isinstance(config, StandIn)
    assert not isinstance(config, GPTConfig)
    assert attributes(config)["n_head"] == 8
    assert attributes({"loss": scalar}) == {"loss": 0.5}
    assert isinstance(path, StandIn)
    assert path.arguments == ("a", "b")


def test_what_would_run_code_is_named_and_does_not_run(
    state: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "model_args": ARGS, "hook": Surprise()}, "c.pt")
    with pytest.raises(UserError, match=r"it names \w+.mkdir.*could run code"):
        read_nanogpt(Path("c.pt"), tokenizer, None)
    assert not Path("surprise").exists()
    torch.save(GPTConfig(), "c.pt")
    with pytest.raises(UserError, match=r"an object of \S*GPTConfig as a whole.*state_dict"):
        read_nanogpt(Path("c.pt"), tokenizer, None)
    torch.save({"model": state, "config": GPTConfig()}, "c.pt")
    with pytest.raises(UserError, match="config has n_head 4, --n-head is 2; leave --n-head out"):
        read_nanogpt(Path("c.pt"), tokenizer, 2)
    torch.save({"model": state, "model_args": "n_head=4"}, "c.pt")
    with pytest.raises(UserError, match="model_args is 'n_head=4', expected names and values"):
        read_nanogpt(Path("c.pt"), tokenizer, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.to("meta"), "on meta"),
        (lambda tensor: tensor.to_sparse(), "layout torch.sparse_coo"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "qint8"),
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
    ],
    ids=["meta", "sparse", "quantized", "complex"],
)
def test_tensors_that_are_no_plain_numbers_are_named(
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    tmp_path: Path,
    change: Callable[[Tensor], Tensor],
    said: str,
) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    torch.save({"model": {**state, name: change(state[name])}, "model_args": ARGS}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=f"{name} is .*{said}.*expected plain numbers"):
        read_nanogpt(tmp_path / "c.pt", tokenizer, None)


def test_tensors_where_settings_should_be_are_one_line(
    state: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.save({"model": state, "model_args": torch.ones(3)}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt is damaged"):
        read_nanogpt(tmp_path / "c.pt", tokenizer, None)


def test_a_damaged_name_of_a_class_is_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "c.pt")
    content = (tmp_path / "c.pt").read_bytes()
    assert b"FloatStorage" in content
    (tmp_path / "c.pt").write_bytes(content.replace(b"FloatStorage", b"FloatStorbge"))
    with pytest.raises(UserError, match="can't be read as tensors and plain values"):
        read_weights(tmp_path / "c.pt")


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_prefixes_in_any_order_and_other_names_of_the_state_dict(
    state: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path, prefix: str, key: str
) -> None:
    torch.save(
        {key: {prefix + name: tensor for name, tensor in state.items()}, "epoch": 1}, tmp_path / "c.pt"
    )
    read = read_nanogpt(tmp_path / "c.pt", tokenizer, 4)
    np.testing.assert_array_equal(read.tensors["wte.weight"], state["lm_head.weight"].numpy())


def llm_c(path: Path, state: dict[str, Tensor], version: int = 3) -> Path:
    """Write a model file of llm.c, tensor by tensor in the order of its documentation."""
    header = np.zeros(256, np.int32)
    header[:8] = [20240326, version, 16, 300, 2, 4, 32, PADDED]
    order = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = [f"h.{layer}.{part}.{kind}" for part in order for kind in ("weight", "bias") for layer in (0, 1)]
    padding = torch.zeros(PADDED - 300, 32)
    tensors = [torch.cat([state["transformer.wte.weight"], padding]), state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.{name}"] for name in [*names, "ln_f.weight", "ln_f.bias"]]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    raw = flat if version == 3 else flat.bfloat16().view(torch.int16)
    path.write_bytes(header.tobytes() + raw.numpy().tobytes())
    return path


def test_llm_c_file_computes_what_transformers_does(
    command: Command,
    model: transformers.GPT2LMHeadModel,
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    source = llm_c(tmp_path / "gpt2.bin", state)
    call = ("--source", source, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "a")
    code, _, err = command("jaxgpt-export", "import-nanogpt", *call)
    assert code == 0, err
    assert "rows 300 to 383 of the vocabulary are no token" in err
    assert "by erf" not in err  # llm.c computes it as this program does
    tokens = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    assert float((load(tmp_path / "a")(tokens) - expected).abs().max()) <= FLOAT32_TOLERANCE
    content = source.read_bytes()
    source.write_bytes(content[:12] + (301).to_bytes(4, "little") + content[16:])
    refused = command("jaxgpt-export", "import-nanogpt", *call, "--overwrite")
    assert_one_line_error(refused, "has 301 tokens, the tokenizer 300")
    source.write_bytes(content[:-4])
    refused = command("jaxgpt-export", "import-nanogpt", *call, "--overwrite")
    assert_one_line_error(refused, "llm.c", "copy it again")


def test_llm_c_file_in_bfloat16_and_bad_ones(
    state: dict[str, Tensor], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = llm_c(tmp_path / "gpt2.bin", state, version=5)
    read = read_nanogpt(path, tokenizer, None)
    expected = state["transformer.h.1.attn.c_proj.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(read.tensors["h.1.attn.c_proj.weight"], expected)
    content = path.read_bytes()
    bad = {
        "within its header": content[:100],
        "llm.c of version 2, expected 3": content[:4] + (2).to_bytes(4, "little") + content[8:],
        "which no model has": content[:8] + bytes(8) + content[16:],
        "expected 77,568 for 2 layers of 32 channels": content + b"more",
    }
    for message, changed in bad.items():
        path.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            read_nanogpt(path, tokenizer, None)
