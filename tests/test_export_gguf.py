"""A GGUF file holds the artifact's tensors, and llama.cpp continues texts as the artifact does."""

import contextlib
import ctypes
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Command, assert_one_line_error, rows
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.tensors import expected_tensors
from jaxgpt_export.interchange.gguf_file import write_gguf
from jaxgpt_export.model.build import load

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

# llama.cpp reads GELU from a table in float16 and keeps keys and values in float16: 2^-11 of values near 3,
# through two layers; measured 3e-3 to 5e-3. A wrong tensor gives differences of the logits' size, 5.
LLAMA_TOLERANCE = 0.03
TEXT = "def add(total):\n    return 'größe' + 日本  # isn't 17\n\n  x  "
SHAPE = ModelConfig(300, 256, 2, 2, 32)  # llama.cpp makes no shorter context than 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE."""
    return make_tokenizer("bpe:300", [row["text"] for row in rows(40)])


def write(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """A random artifact whose logits are of size 5."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (_, shape) in expected_tensors(config, None).items():
        size = 0.3 if len(shape) == 2 else 0.1
        gain = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        tensors[name] = (torch.randn(shape, generator=generator) * size + gain).numpy()
    folder.mkdir()
    write_artifact(folder, config, None, tensors, tokenizer)
    return folder


@pytest.fixture(params=["tied", "untied"])
def artifact(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A float32 artifact."""
    config = dataclasses.replace(SHAPE, tied=request.param == "tied")
    return write(tmp_path / "a", config, tokenizer)


def make(command: Command, artifact: Path, kind: str) -> Path:
    out = artifact.parent / f"{kind}.gguf"
    code, said, err = command(
        "jaxgpt-export", "gguf", "--artifact", artifact, "--out", out, "--type", kind, "--json"
    )
    assert code == 0, err
    assert json.loads(said)["type"] == kind
    return out


def q8_0(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """ggml's reference for one block after another: float16 scale = largest / 127, halves away from zero."""
    blocks = array.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    parts = [scale.astype("<f2").view(np.uint8), q.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(len(array), -1)


# The names of llama.cpp's src/llama-arch.cpp for LLM_ARCH_GPT2.
BLOCK_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
OTHER_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{OTHER_NAMES[stem]}.{part}"
    _, index, layer = stem.split(".", 2)
    return f"blk.{index}.{BLOCK_NAMES[layer]}.{part}"


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_file_holds_the_artifacts_tensors(command: Command, artifact: Path, kind: str) -> None:
    reader = gguf.GGUFReader(make(command, artifact, kind))
    found = {tensor.name: tensor for tensor in reader.tensors}
    tensors = read_artifact(artifact).tensors
    assert found.keys() == {gguf_name(name) for name in tensors}
    assert "output.weight" in found or read_artifact(artifact).config.tied
    for name, ours in tensors.items():
        theirs = found[gguf_name(name)]
        assert tuple(theirs.shape) == ours.shape[::-1]  # GGUF counts dimensions from the fastest
        plain = kind == "f32" or ours.ndim == 1 or name == "wpe.weight"
        expected = ours if plain else ours.astype(np.float16) if kind == "f16" else q8_0(ours)
        assert theirs.data.dtype == expected.dtype
        assert np.array_equal(theirs.data.reshape(expected.shape), expected), name


def test_file_says_what_llama_cpp_needs(command: Command, artifact: Path, tokenizer: Tokenizer) -> None:
    reader = gguf.GGUFReader(make(command, artifact, "f16"))
    expected = {
        "general.architecture": "gpt2", "general.file_type": 1, "gpt2.context_length": 256,
        "gpt2.embedding_length": 32, "gpt2.feed_forward_length": 128, "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 299, "tokenizer.ggml.eos_token_id": 299,
    }  # fmt: skip
    for key, value in expected.items():
        assert reader.fields[key].contents() == value, key
    assert reader.fields["gpt2.attention.layer_norm_epsilon"].contents() == pytest.approx(1e-5)
    vocab = json.loads((artifact / "vocab.json").read_text())
    assert reader.fields["tokenizer.ggml.tokens"].contents() == sorted(vocab, key=vocab.get)
    assert reader.fields["tokenizer.ggml.token_type"].contents() == [1] * 299 + [3]
    merges = (artifact / "merges.txt").read_text().splitlines()[1:]
    assert reader.fields["tokenizer.ggml.merges"].contents() == merges


def test_q8_0_halves_are_rounded_away_from_zero_by_the_formula() -> None:
    block = np.zeros((1, 32), np.float32)
    block[0, :4] = 127, 0.5, -1.5, 2.5
    assert q8_0(block)[0, 2:6].view(np.int8).tolist() == [127, 1, -2, 3]


@contextlib.contextmanager
def llama(path: Path) -> Iterator[Any]:
    """A model in llama.cpp.

    Without its copies of weights for AMX: where a virtual machine shows AMX and does not permit it, llama.cpp
    dies on any q8_0 file, those of its own quantizer included.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    low: Any = llama_cpp.llama_cpp
    defaults = low.llama_model_default_params

    def plain() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low, "llama_model_default_params", plain)
        model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


def test_q8_0_file_holds_the_bytes_of_llama_cpps_own_quantizer(command: Command, artifact: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    ours, theirs = make(command, artifact, "q8_0"), artifact.parent / "theirs.gguf"
    f32 = str(make(command, artifact, "f32")).encode()
    assert llama_cpp.llama_model_quantize(f32, str(theirs).encode(), ctypes.byref(parameters)) == 0
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name


def test_llama_cpp_gives_the_logits_and_greedy_tokens_of_the_artifact(
    command: Command, artifact: Path
) -> None:
    module, start = load(artifact), [5, 100, 200]
    ours, theirs = list(start), list(start)
    with llama(make(command, artifact, "f32")) as model:
        model.eval(start)
        expected = module(torch.tensor([start]))[0].numpy()
        assert np.abs(np.array(model.scores[: len(start)]) - expected).max() <= LLAMA_TOLERANCE
        for _ in range(24):
            ours.append(int(module(torch.tensor([ours]))[0, -1].argmax()))
            theirs.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(theirs[-1:])
    assert theirs == ours
    assert len(set(ours)) > 4  # a model that repeats one token would prove little


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_llama_cpp_runs_the_smaller_types(command: Command, artifact: Path, kind: str) -> None:
    tokens = [5, 100, 200]
    exact = load(artifact)(torch.tensor([tokens]))[0].numpy()
    with llama(make(command, artifact, kind)) as model:
        model.eval(tokens)
        scores = np.array(model.scores[: len(tokens)])
    # Scales of 1 / 127 of a block's largest weight, at random, over 2 layers: some per cent of the logits.
    assert np.abs(scores - exact).max() <= 0.1 * np.abs(exact).max()


def test_llama_cpp_cuts_text_into_the_same_tokens(
    command: Command, artifact: Path, tokenizer: Tokenizer
) -> None:
    with llama(make(command, artifact, "f16")) as model:
        assert model.tokenize(TEXT.encode(), add_bos=False, special=False) == tokenizer.encode(TEXT)
        assert model.detokenize(tokenizer.encode(TEXT)).decode() == TEXT
        assert model.token_eos() == tokenizer.endoftext


def test_what_the_library_leaves_out_is_no_file(
    command: Command, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("gguf", "--artifact", artifact, "--out", tmp_path / "x.gguf", "--type", "f32")
    for method, part in (("add_token_merges", "merges"), ("add_token_types", "token_type")):
        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, method, lambda self, values: None)
            assert_one_line_error(command("jaxgpt-export", *call), f"lacks or changes {part}; it is not kept")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*.tmp*"))


def test_a_tokenizer_that_llama_cpp_runs_otherwise_is_refused_whoever_writes(
    artifact: Path, tmp_path: Path
) -> None:
    bytes_alone = make_tokenizer("bpe:257", ["a"])
    with pytest.raises(UserError, match=r"has no merges, and llama\.cpp loads no such file"):
        write_gguf(read_artifact(artifact), bytes_alone, tmp_path / "x.gguf", "f32")


def test_what_llama_cpp_does_not_compute_is_one_line(
    command: Command, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def refused(config: ModelConfig, name: str, kind: str, *parts: str) -> None:
        folder = write(tmp_path / name, config, tokenizer)
        call = ("--artifact", folder, "--out", tmp_path / "x.gguf", "--type", kind)
        assert_one_line_error(command("jaxgpt-export", "gguf", *call), *parts)
        assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*.tmp*"))

    refused(dataclasses.replace(SHAPE, positions="rotary"), "rotary", "f32", "rotary positions", "llama.cpp")
    refused(dataclasses.replace(SHAPE, n_embd=40), "forty", "q8_0", "n_embd (40)", "divisible by 32", "f16")
    folder = write(tmp_path / "a", SHAPE, tokenizer)
    refusals = {"x.bin": "must end in .gguf", "a": "must end in .gguf"}
    for name, part in refusals.items():
        call = ("--artifact", folder, "--out", tmp_path / name, "--type", "f32")
        assert_one_line_error(command("jaxgpt-export", "gguf", *call), part)
    call = ("--artifact", folder, "--out", tmp_path / "y.gguf")
    assert command("jaxgpt-export", "gguf", *call)[0] == 0
    assert_one_line_error(command("jaxgpt-export", "gguf", *call), "exists", "--overwrite")
    assert command("jaxgpt-export", "gguf", *call, "--overwrite")[0] == 0
