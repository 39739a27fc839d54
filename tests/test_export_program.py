"""A torch.export program gives the module's logits, whatever batch and time, without this project's code."""

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error, python, rows
from jaxgpt_export.format.artifact import write_artifact
from jaxgpt_export.format.probe import Probe, write_probe
from jaxgpt_export.format.scheme import Quantization
from jaxgpt_export.format.tensors import Shapes, expected_tensors
from jaxgpt_export.interchange import torch_export as program_module
from jaxgpt_export.model.build import as_array, load
from jaxgpt_export.quantize.methods import find_method

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.tensor_file import BFLOAT16, Arrays

CONFIG = ModelConfig(300, 16, 1, 2, 64)
ROTARY = ModelConfig(300, 16, 1, 2, 64, positions="rotary", tied=False)
KINDS = [
    "fp32",
    "rotary",
    "fp16",
    "int8-dynamic",
    "int8-static",
    "int8-weight-only",
    "int4-weight-only",
    "int4-dynamic",
]
FLOAT32_TOLERANCE = 1e-5  # the program's own gate; the same operators, so 0 is measured


def random_tensors(shapes: Shapes) -> Arrays:
    """Tensors of these shapes that make logits of size 1."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, (dtype, shape) in shapes.items():
        if name.endswith(".group_factor"):
            tensor = torch.randint(1, 128, shape, generator=draw, dtype=torch.int8)
            tensor[::2] *= -1
        elif dtype == np.int8:
            tensor = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
        elif dtype == np.uint8:
            tensor = torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
        elif name.endswith("_scale"):
            size = 0.03 if name.endswith("input_scale") else 0.002
            tensor = size * (0.5 + torch.rand(shape, generator=draw))
            tensor = tensor.to(torch.bfloat16) if dtype == BFLOAT16 else tensor
        else:
            gain = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", ".smooth")) else 0.0
            tensor = 0.1 * torch.randn(shape, generator=draw) + gain
            tensor = tensor.half() if dtype == np.float16 else tensor
        found[name] = as_array(tensor)
    return found


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random artifact of each kind, with a probe."""
    return make_artifact(request.param, tmp_path_factory.mktemp(request.param) / "a")


def make_artifact(kind: str, folder: Path) -> Path:
    config = ROTARY if kind == "rotary" else CONFIG
    quantization = None
    if kind not in ("fp32", "rotary"):
        smooth = ("h.0.mlp.c_proj", "wte") if kind == "int8-static" else ()
        schemes = find_method(kind).schemes(config)
        for name, scheme in schemes.items():
            group_size = 16 if scheme.weight_bits == 4 else 0
            schemes[name] = dataclasses.replace(scheme, group_size=group_size, smoothing=name in smooth)
        quantization = Quantization(kind, schemes)
    tensors = random_tensors(expected_tensors(config, quantization))
    folder.mkdir()
    write_artifact(
        folder, config, quantization, tensors, make_tokenizer("bpe:300", [r["text"] for r in rows(40)])
    )
    tokens = np.random.default_rng(2).integers(300, size=(2, 16), dtype=np.int32)
    write_probe(folder, Probe(tokens, np.arange(2, dtype=np.int32), np.zeros((2, 300), np.float32)))
    return folder


def test_program_gives_the_modules_logits_for_any_batch_and_time(
    command: Command, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.pt2"
    code, said, err = command("jaxgpt-export", "program", "--artifact", artifact, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(said)["max_abs_logit_diff"] <= FLOAT32_TOLERANCE
    program, module = torch.export.load(out).module(), load(artifact)
    for shape in ((1, 1), (1, 2), (1, 16), (3, 7), (5, 1)):
        tokens = torch.randint(300, shape, generator=torch.Generator().manual_seed(3))
        logits = module(tokens)
        assert float(logits.std()) > 0.1  # not all alike
        assert float((program(tokens) - logits).abs().max()) <= FLOAT32_TOLERANCE, shape
    with pytest.raises(AssertionError):  # torch.export's own guard
        program(torch.zeros(1, 17, dtype=torch.int64))
    assert not list(tmp_path.glob(".*"))


def test_int8_program_multiplies_integers_and_programs_stay_small(command: Command, tmp_path: Path) -> None:
    sizes = {}
    for kind in ("fp32", "fp16", "int8-dynamic", "int8-static"):
        folder, out = make_artifact(kind, tmp_path / kind), tmp_path / f"{kind}.pt2"
        assert command("jaxgpt-export", "program", "--artifact", folder, "--out", out)[0] == 0
        exported = torch.export.load(out)
        called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        products = called.count(torch.ops.aten._int_mm.default)
        assert products == (0 if kind.startswith("fp") else 4 * CONFIG.n_layer + 1)
        assert (torch.ops.aten.linear.default in called) == kind.startswith("fp")
        stored = {**exported.state_dict, **exported.constants}
        unique = {t.untyped_storage().data_ptr(): t for t in stored.values() if isinstance(t, torch.Tensor)}
        sizes[kind] = sum(t.untyped_storage().nbytes() for t in unique.values())
    assert sizes["fp16"] < 0.52 * sizes["fp32"]
    assert sizes["int8-dynamic"] < 0.35 * sizes["fp32"]
    assert sizes["int8-static"] < 0.35 * sizes["fp32"]


def test_program_runs_without_this_project(command: Command, tmp_path: Path) -> None:
    folder, out = make_artifact("int8-static", tmp_path / "a"), tmp_path / "model.pt2"
    assert command("jaxgpt-export", "program", "--artifact", folder, "--out", out)[0] == 0
    expected = load(folder)(torch.tensor([[1, 2, 3]])).sum()
    arguments, environment = python(
        f"""
import sys, torch
logits = torch.export.load({str(out)!r}).module()(torch.tensor([[1, 2, 3]]))
assert not {{"jaxgpt_export", "jaxgpt", "jax"}} & sys.modules.keys()
print(float(logits.sum()))
"""
    )
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_program_that_computes_something_else_leaves_no_file(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_artifact("fp32", tmp_path / "a")
    real = program_module.storable

    def mistaken(model: torch.nn.Module, half: object) -> torch.nn.Module:
        copied = real(model, half)
        copied.ln_f.bias = torch.nn.Parameter(copied.ln_f.bias + 0.01)
        return copied

    monkeypatch.setattr(program_module, "storable", mistaken)
    code, _, err = command("jaxgpt-export", "program", "--artifact", folder, "--out", tmp_path / "x.pt2")
    assert code == 1
    assert "FAIL" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_name_of_the_program_is_checked_first(command: Command, tmp_path: Path) -> None:
    call = ("--artifact", tmp_path / "a", "--out", tmp_path / "x.pt")
    assert_one_line_error(command("jaxgpt-export", "program", *call), "must end in .pt2")
    (tmp_path / "x.pt2").write_text("mine")
    call = ("--artifact", tmp_path / "a", "--out", tmp_path / "x.pt2")
    assert_one_line_error(command("jaxgpt-export", "program", *call), "exists", "--overwrite")
    assert (tmp_path / "x.pt2").read_text() == "mine"
