"""Every peer computes the same model: logits beside the module's, greedy tokens beside each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jaxgpt_bench
import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error, python
from jaxgpt_bench.common.rows import speed_name
from jaxgpt_bench.common.timing import timed_generation
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import Prepared
from jaxgpt_bench.speed.contestants import peer_contestants
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.interchange.blocks import block_size_for, pack_pairs, round_blocks
from jaxgpt_export.model.build import as_arrays, load

from jaxgpt.generation.session import Session
from jaxgpt.shared.config import ModelConfig

CONFIG = ModelConfig(vocab_size=384, block_size=32, n_layer=2, n_head=2, n_embd=64)
PROMPT = [5, 17, 300, 41, 8, 77, 120]
# Length of the difference, in lengths of the logits. Float32 in another order of sums gives 7e-7;
# llama.cpp reads GELU from a table in float16 and gives 1e-3. ExecuTorch's XNNPACK computes it by erf, up to
# 5e-4 beside GPT-2's formula with tanh, and gives 2e-4.
FLOAT = 1e-5
FLOAT_BY_ENGINE = {"llama.cpp": 5e-3, "executorch": 1e-3}
# Rounded to nearest, on random weights, which have no redundancy: about twice what was measured (1e-3,
# 0.03, 0.05, 0.31; with inputs of 8 bits 0.34). A permuted or transposed matrix gives more than 1.
QUANTIZED = {
    "fp16": 3e-3,
    "int8-weight-only": 0.06,
    "int8-dynamic": 0.1,
    "int4-weight-only": 0.6,
    "int4-dynamic": 0.6,
}

PEERS = find_peers()
ROWS = [(name, precision) for name, peer in PEERS.items() for precision in peer.precisions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 artifact with weights large enough that its greedy text is no repetition."""
    folder = tmp_path_factory.mktemp("peers") / "fp32"
    folder.mkdir()
    drawn = random_tensors(CONFIG)
    tensors = {
        name: tensor * 8 if tensor.ndim == 2 and name != "wte.weight" else tensor
        for name, tensor in drawn.items()
    }
    content = to_hf_layout(as_arrays(tensors), CONFIG)
    write_artifact(folder, CONFIG, None, content, placeholder_tokenizer(CONFIG.vocab_size))
    return folder


def prepared(name: str, precision: str, folder: Path, scratch: Path) -> Prepared:
    peer = PEERS[name]
    for module in peer.missing():
        pytest.skip(f"{module} is not installed (pip install {peer.install})")
    return peer.convert(read_artifact(folder), precision, scratch, threads=1)


def reference(folder: Path, count: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits before each, from the module without any cache."""
    model, tokens, logits = load(folder), list(PROMPT), []
    with torch.inference_mode():
        for _ in range(count):
            logits.append(model(torch.tensor([tokens]))[0, -1].numpy())
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(PROMPT) :], np.stack(logits)


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PEERS["torchao"], "compiled", False)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize(("name", "precision"), ROWS)
def test_a_peer_gives_the_module_s_logits_and_greedy_tokens(
    name: str, precision: str, folder: Path, tmp_path: Path
) -> None:
    made = prepared(name, precision, folder, tmp_path)
    assert 0 < made.bytes_per_token <= made.file_bytes
    tokens, logits = reference(folder, 12)
    assert len(set(tokens)) > 4
    for settings in PEERS[name].settings_tried(precision):
        engine = PEERS[name].open(made.path, precision, 1, settings=settings)
        check_logits(name, precision, engine, tokens, logits)


def check_logits(name: str, precision: str, engine: Session, tokens: list[int], logits: np.ndarray) -> None:
    assert engine.block_size == CONFIG.block_size
    for _ in range(2):  # the second time after a text: start forgets it
        theirs = [np.array(engine.prefill(PROMPT))]
        theirs += [np.array(engine.decode(token)) for token in tokens[:-1]]
        floats = precision == "fp32"
        allowed = FLOAT_BY_ENGINE.get(name, FLOAT) if floats else QUANTIZED[precision]
        error = np.linalg.norm(np.stack(theirs) - logits) / np.linalg.norm(logits)
        assert error < allowed
    if not floats:
        assert error > 1e-6  # it is rounded at all
    timed = timed_generation(engine, PROMPT, 12)
    assert len(timed["tokens"]) == 12
    assert min(timed["prefill_s"], timed["decode_s"]) > 0
    if floats:
        assert timed["tokens"] == tokens


@pytest.mark.slow
@pytest.mark.parametrize("precision", PEERS["torchao"].precisions)
def test_torchao_compiled_gives_the_module_s_logits(precision: str, folder: Path, tmp_path: Path) -> None:
    made = prepared("torchao", precision, folder, tmp_path)
    choices = PEERS["torchao"].choices(precision)
    assert {(each.settings["max_autotune"], *each.environment.values()) for each in choices} == {
        (True,), (True, "PASSIVE")
    }  # fmt: skip
    tokens, logits = reference(folder, 20)  # past the first step by which what is read of the cache grows
    engine = PEERS["torchao"].open(made.path, precision, 1)
    theirs = [np.array(engine.prefill(PROMPT)), *(np.array(engine.decode(token)) for token in tokens[:-1])]
    error = np.linalg.norm(np.stack(theirs) - logits) / np.linalg.norm(logits)
    assert error < (FLOAT if precision == "fp32" else QUANTIZED[precision])


def test_a_peer_s_process_does_not_carry_pytorch() -> None:
    names = "jaxgpt_bench.speed.contestant_process, jaxgpt_bench.peers"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=python("")[1], check=False).returncode == 0


def test_what_is_not_installed_or_fails_is_left_out_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PEERS["openvino"], "missing", lambda: ["openvino"])
    monkeypatch.setattr(PEERS["transformers"], "variants", PEERS["openvino"].variants)
    monkeypatch.setattr(PEERS["torch-quantize-dynamic"], "engine", "no-such-engine")
    names = ["transformers", "torch-quantize-dynamic", "openvino"]
    found, left_out = peer_contestants([read_artifact(folder)], names, tmp_path, 1)
    assert [each.name for each in found] == ["transformers fp32"]
    assert left_out["openvino"] == "openvino not installed (pip install openvino)"
    assert "stopped with code 1" in left_out["no-such-engine int8-dynamic"]
    assert "openvino is left out: openvino not installed" in capfd.readouterr().err


ECHO = """
from jaxgpt_bench.peers.peer import NO_SETTINGS, PLAIN, Peer, Prepared


class EchoSession:
    block_size = 32

    def prefill(self, tokens):
        import numpy as np

        return np.eye(1, 384, tokens[-1])[0]

    def decode(self, token):
        return self.prefill([token])


class Echo(Peer):
    engine = "echo"
    modules = ("json",)
    install = "nothing"
    precisions = ("fp16",)

    def convert(self, artifact, precision, scratch, threads):
        (scratch / "model").write_text("x")
        return Prepared(scratch, 1000)

    def open(self, path, precision, threads, variant=PLAIN, settings=NO_SETTINGS):
        return EchoSession()


PEER = Echo()
"""


def test_a_peer_is_added_by_one_file(folder: Path, tmp_path: Path) -> None:
    """A copy of the package with one more file in peers/ measures it: no list names it elsewhere."""
    source = Path(jaxgpt_bench.__file__).parent
    package = tmp_path / "lib" / "jaxgpt_bench"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "peers" / "echo.py").write_text(ECHO)
    out = tmp_path / "speed.json"
    call = ["generate", "--artifact", folder, "--tokens", "4", "--rounds", "1", "--threads", "1"]
    subprocess.run(
        [sys.executable, "-m", "jaxgpt_bench", *map(str, call), "--peer", "echo", "--out", str(out)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])},
    )
    rows = {row["engine"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["echo"]["precision"] == "fp16"
    assert len(set(rows["echo"]["greedy_tokens"])) == 1
    assert "jaxgpt-torch" in rows


def test_every_peer_s_row_has_a_name_of_its_own() -> None:
    names = [
        speed_name(name, precision, **vars(variant))
        for name, peer in PEERS.items() for precision in peer.precisions for variant in peer.variants
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert "transformers fp32, no KV cache, every logit" in names


def test_a_peer_that_does_not_exist_is_one_line(command: Command, folder: Path) -> None:
    arguments = ("--artifact", folder, "--tokens", 4, "--peer", "onxruntime")
    assert_one_line_error(
        command("jaxgpt-bench", "generate", *arguments), "'onxruntime'", "did you mean onnxruntime"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_within_half_a_scale(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    block = block_size_for(96)
    assert block == 32
    q, scale = round_blocks(weight, block, bits)
    back = ((q.astype(np.float32) - 2 ** (bits - 1)) * scale[..., None]).reshape(weight.shape)
    # 4 bits: the side opposite to the extreme ends at 7, one scale short.
    bound = np.abs(scale).repeat(block, axis=1) * (0.501 if bits == 8 else 1.001)
    assert (np.abs(back - weight) <= bound).all()
    if bits == 4:
        packed = pack_pairs(q)
        assert (packed & 15 == q[..., ::2]).all()
        assert (packed >> 4 == q[..., 1::2]).all()
