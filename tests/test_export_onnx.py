"""ONNX Runtime computes of a folder what the artifact does; a folder that does not is not kept."""

import ast
import dataclasses
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Command, assert_one_line_error, rows
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.certificate import write_certificate
from jaxgpt_export.format.probe import Probe, write_probe
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.interchange.onnx import graph
from jaxgpt_export.model.build import as_arrays, float_model, load
from jaxgpt_export.parity.probe_gates import measure, probe_logits

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.config import ModelConfig

onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install -e '.[onnx]')")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "onnx_generate.py"
CONFIG = ModelConfig(vocab_size=300, block_size=24, n_layer=2, n_head=2, n_embd=64)
# Length of the difference, in lengths of the logits: float32 in another order of sums gives 7e-7; rounded to
# nearest, on random weights, about half of this. A permuted or transposed matrix gives more than 1.
TOLERANCE = {"float32": 1e-5, "int8-weight-only": 0.06, "int8-dynamic": 0.1, "int4-weight-only": 0.6}
EXTRA_BYTES = 20_000  # of model.onnx: nodes, metadata and the smallest weights


def write(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """A float32 artifact with weights large enough that its greedy text is no repetition."""
    folder.mkdir()
    tensors = {
        name: tensor * 8 if tensor.ndim == 2 and name != "wte.weight" else tensor
        for name, tensor in random_tensors(config).items()
    }
    tokenizer = make_tokenizer(f"bpe:{config.vocab_size}", [row["text"] for row in rows(40)])
    write_artifact(folder, config, None, to_hf_layout(as_arrays(tensors), config), tokenizer)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.block_size), dtype=np.int32)
    positions = np.array([0, 7, 8, 23, 31, 47], np.int32)  # alone, after others, next to each other, the last
    probe = Probe(tokens, positions, np.zeros((len(positions), config.vocab_size), np.float32))
    model = float_model(config, tensors)
    probe = dataclasses.replace(probe, logits=probe_logits(model, probe).numpy())
    write_probe(folder, probe)
    parity = dataclasses.asdict(measure(model, probe))
    write_certificate(folder, "fp32", {"step": None, "source": "random"}, {"parity": parity})
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "untied", dataclasses.replace(CONFIG, tied=False))


def call(artifact: Path, out: Path, precision: str = "float32") -> tuple[object, ...]:
    return ("jaxgpt-export", "onnx", "--artifact", artifact, "--out", out, "--precision", precision)


def relative(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def by_hand(folder: Path, pieces: list[list[int]]) -> npt.NDArray[np.float32]:
    """Logits after each piece of a text, as the folder's README tells; every run gives a new cache."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    past = {each.name: np.zeros(each.shape, np.float32) for each in session.get_inputs()[4:]}
    assert set(past) == {f"past_key_values.{n}.{part}" for n in (0, 1) for part in ("key", "value")}
    names = [each.name for each in session.get_outputs()]
    found, done = [], 0
    for piece in pieces:
        end = done + len(piece)
        given = {
            "input_ids": np.array([piece], np.int64),
            "position_ids": np.arange(done, end, dtype=np.int64)[None],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array([end], np.int32),
        }
        outputs = dict(zip(names, session.run(None, {**given, **past}), strict=True))
        found.append(outputs["logits"][0, 0])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        done = end
    return np.stack(found)


@pytest.mark.parametrize(
    ("precision", "head"),
    [
        ("float32", "tied"),
        ("float32", "untied"),
        ("int8-dynamic", "tied"),
        ("int8-weight-only", "untied"),
        ("int4-weight-only", "tied"),
    ],
)
def test_onnx_runtime_gives_the_module_s_logits_step_by_step(
    command: Command, request: pytest.FixtureRequest, tmp_path: Path, precision: str, head: str
) -> None:
    artifact, out = request.getfixturevalue(head), tmp_path / "out"
    code, said, err = command(*call(artifact, out, precision), "--json")
    assert code == 0, err
    figures = json.loads(said)
    assert figures["precision"] == precision
    tokens = np.random.default_rng(1).integers(CONFIG.vocab_size, size=CONFIG.block_size).tolist()
    pieces = [tokens[:7], tokens[7:8], tokens[8:9], tokens[9:12], *([token] for token in tokens[12:])]
    ends = np.cumsum([len(piece) for piece in pieces])
    with torch.inference_mode():
        expected = load(artifact)(torch.tensor([tokens]))[0, ends - 1].numpy()
    error = relative(by_hand(out, pieces), expected)
    assert error < TOLERANCE[precision]
    assert (error > 1e-3) == (precision != "float32")  # what should be rounded is


def test_the_folder_holds_what_a_stranger_needs(command: Command, tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(*call(tied, out, "int4-weight-only"))[0] == 0
    names = {path.name for path in out.iterdir()}
    theirs = {path.name for path in tied.iterdir()} - {
        "model.safetensors", "certificate.json", "probe.safetensors", "README.md"
    }  # fmt: skip
    assert names == theirs | {"model.onnx", "model.onnx.data", "README.md"}
    assert all((out / name).read_bytes() == (tied / name).read_bytes() for name in theirs)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "S = 24" in card
    model = onnx.load(out / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(out / "model.onnx"))
    told = {each.key: each.value for each in model.metadata_props}
    assert told["precision"] == "int4-weight-only"
    for each in (*model.graph.input, *model.graph.output):
        stem = each.name.rsplit(".", 1)
        name = each.name if len(stem) == 1 else f"{stem[0].rsplit('.', 1)[0]}.N.key, .value"
        assert f"| `{name}` | {told[name]} |" in card
    refused = command("jaxgpt-export", "generate", "--artifact", out)
    assert_one_line_error(refused, "is a model for ONNX Runtime; give the artifact")


def test_large_weights_lie_beside_the_graph_in_aligned_places(
    command: Command, tied: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command(*call(tied, out))[0] == 0
    assert (out / "model.onnx").stat().st_size < EXTRA_BYTES
    weights = onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
    places = [{each.key: each.value for each in weight.external_data} for weight in weights]
    outside = [place for place in places if place]
    assert len(outside) == 2 + 4 * 2 + 2 + 1  # embeddings, matrices, biases of fc, head
    ends = 0
    for place in outside:
        assert place["location"] == "model.onnx.data"
        assert int(place["offset"]) % 64 == 0
        assert int(place["offset"]) - ends in range(64)
        ends = int(place["offset"]) + int(place["length"])
    assert ends == (out / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("precision", sorted(TOLERANCE))
def test_the_peer_runs_the_very_graph_that_is_exported(
    command: Command, tied: Path, tmp_path: Path, precision: str
) -> None:
    scratch = tmp_path / "peer"
    scratch.mkdir()
    peer = find_peers()["onnxruntime"]
    peer.convert(read_artifact(tied), {"float32": "fp32"}.get(precision, precision), scratch, 1)
    assert command(*call(tied, tmp_path / "out", precision))[0] == 0
    folders = (scratch, tmp_path / "out")
    models = [onnx.load(folder / "model.onnx", load_external_data=False) for folder in folders]
    for model in models:
        del model.metadata_props[:]
    assert models[0] == models[1]
    data = [(folder / "model.onnx.data").read_bytes() for folder in folders]
    assert data[0] == data[1]


def swap(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.roll(array, 1, axis=0)


def _other_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph, "LAYER_NORM_EPSILON", 1e-3)


def _rows_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = graph.round_rows
    patch.setattr(graph, "round_rows", lambda weight: (swap(right(weight)[0]), right(weight)[1]))


def _halves_of_bytes_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = graph.pack_pairs
    patch.setattr(graph, "pack_pairs", lambda q: (right(q) >> 4) | (right(q) << 4))


@pytest.mark.parametrize(
    ("precision", "defect", "said"),
    [
        ("float32", _other_epsilon, "logits differ from the probe's by at most"),
        ("int8-dynamic", _rows_in_another_order, "relative error from the probe"),
        ("int4-weight-only", _halves_of_bytes_in_another_order, "error from the module with these weights"),
    ],
)
def test_a_graph_that_computes_something_else_is_not_kept(
    command: Command,
    tied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    defect: Callable[[pytest.MonkeyPatch], None],
    said: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("an earlier one")
    defect(monkeypatch)
    code, _, err = command(*call(tied, out, precision), "--overwrite")
    assert code == 1
    assert err.startswith(f"FAIL  {out}: ")
    assert said in err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.onnx"]
    assert (out / "model.onnx").read_text() == "an earlier one"


def test_what_the_graph_does_not_compute_is_refused_in_a_line(
    command: Command, tied: Path, int8_dynamic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    odd = write(tmp_path / "odd", dataclasses.replace(CONFIG, n_embd=24, n_head=3))
    narrow = write(tmp_path / "narrow", dataclasses.replace(CONFIG, n_embd=48, n_head=4))
    rotary = write(tmp_path / "rotary", dataclasses.replace(CONFIG, positions="rotary"))
    assert_one_line_error(
        command(*call(int8_dynamic, out)), "is int8-dynamic; onnx takes the float32 artifact"
    )
    assert_one_line_error(command(*call(rotary, out)), "has rotary positions", "jaxgpt-export program")
    assert_one_line_error(command(*call(odd, out, "int4-weight-only")), "n_embd (24) must be divisible by 16")
    assert_one_line_error(command(*call(narrow, out)), "heads of 12 channels", "multiples of 8")
    assert_one_line_error(command(*call(tmp_path / "none", out)), "none is missing")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").touch()
    assert_one_line_error(command(*call(tied, out)), f"{out} exists")
    assert_one_line_error(command(*call(tied, out), "--overwrite"), "holds no model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow", "odd", "out", "rotary"]


def test_a_probe_that_was_changed_or_lost_is_refused(command: Command, tmp_path: Path) -> None:
    artifact, out = write(tmp_path / "a"), tmp_path / "out"
    probe = artifact / "probe.safetensors"
    content = probe.read_bytes()
    probe.write_bytes(content[:-4] + b"\0\0\x80\x7f")
    assert_one_line_error(command(*call(artifact, out)), "probe.safetensors changed since")
    (artifact / "certificate.json").unlink()
    assert_one_line_error(command(*call(artifact, out)), "certificate.json is missing")
    assert list(tmp_path.iterdir()) == [artifact]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named_with_what_to_install(
    command: Command, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = command(*call(tied, tmp_path / "out"))
    assert_one_line_error(result, f"needs {package}", "pip install -c constraints.txt -e '.[onnx]'")
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_lacks_an_operator_is_one_line(
    command: Command, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CONTRIB", "com.nobody")
    result = command(*call(tied, tmp_path / "out"))
    assert_one_line_error(result, "can't run the model", "install 1.23 or newer")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def example(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run docs/examples/onnx_generate.py in this process: what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        capfd.readouterr()
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_the_example_writes_the_artifact_s_greedy_text_and_draws_by_seed(
    command: Command, tied: Path, tmp_path: Path, example: Callable[..., str]
) -> None:
    out, prompt = tmp_path / "out", "Write a function to é"
    assert command(*call(tied, out))[0] == 0
    words = ("--prompt", prompt, "--max-new-tokens", 10, "--temperature", 0, "--engine", "torch", "--json")
    code, said, err = command("jaxgpt-export", "generate", "--artifact", tied, *words)
    assert code == 0, err
    greedy = example(out, prompt, "--max-new-tokens", 10)
    expected = f"{prompt}{json.loads(said.splitlines()[-1])['text']}\n"
    # Random weights give bytes that are no text: how many signs stand for them is up to the decoder.
    assert re.sub("\ufffd+", "?", greedy) == re.sub("\ufffd+", "?", expected)
    drawn = [example(out, prompt, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].startswith(prompt)
    assert greedy not in drawn


def test_the_example_needs_no_more_than_it_says() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [each.name for each in node.names] if isinstance(node, ast.Import) else []
        )
    }  # fmt: skip
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "tokenizers"}
