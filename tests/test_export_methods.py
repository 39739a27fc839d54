"""A method is one file: another one is found by its name; what it made is read and run without the file."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate, write_certificate
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.quantize import methods
from tiny_artifacts import tiny_artifacts

from jaxgpt.shared.errors import UserError

# The engine rounds float inputs of the MLPs to 256ths of a 127th of a row's largest, the module does not.
ROUNDED_INPUTS = 3e-4
METHOD_FILE = '''
"""int4-mlp: 4 bits in the MLPs, 8 bits with dynamic inputs in attention and head."""

from jaxgpt.shared.architecture import linear_layers
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import group_size_of


class Int4Mlp(Method):
    def schemes(self, config):
        four = LayerScheme(weight_bits=4, group_size=group_size_of(config))
        linear = linear_layers(config).items()
        mlps = {name: four for name, layer in linear if layer.name_in_block.startswith("mlp.")}
        return uniform_schemes(config, "dynamic") | mlps

    def quantize(self, quantizer, schemes):
        return quantizer.grouped(self.name, schemes, "nearest")


METHOD = Int4Mlp()
'''


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("methods"))


@pytest.fixture
def method_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A method's file in a folder that the methods' package looks into."""
    (tmp_path / "more").mkdir()
    path = tmp_path / "more" / "int4_mlp.py"
    path.write_text(METHOD_FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(path.parent)])
    importlib.invalidate_caches()
    methods.all_methods.cache_clear()
    yield path
    forget()


def forget() -> None:
    """Let the process forget the file, as a new one would not know it."""
    sys.modules.pop(f"{methods.__name__}.int4_mlp", None)
    if hasattr(methods, "int4_mlp"):
        del methods.int4_mlp
    importlib.invalidate_caches()
    methods.all_methods.cache_clear()


def assert_works(command: Command, folder: Path) -> None:
    """The artifact is verified, and generates with module and engine."""
    code, _, err = command("jaxgpt-export", "verify", "--artifact", folder)
    assert code == 0, err
    arguments = ("generate", "--artifact", folder, "--max-new-tokens", 4, "--temperature", 0, "--json")
    for engine in ("torch", "native") if instruction_sets() else ("torch",):
        code, out, err = command("jaxgpt-export", *arguments, "--engine", engine)
        assert code == 0, err
        assert json.loads(out)["engine"].startswith(f"jaxgpt-{engine}")
        assert json.loads(out)["kind"] == read_artifact(folder).kind


def test_one_more_method_is_one_file_and_its_artifact_needs_none(
    command: Command, folders: dict[str, Path], method_file: Path, tmp_path: Path
) -> None:
    assert len(methods.all_methods()) == 8
    out = tmp_path / "a"
    arguments = ("--artifact", folders["fp32"], "--method", "int4-mlp", "--out", out)
    code, _, err = command("jaxgpt-export", "quantize", *arguments)
    assert code == 0, err
    method_file.unlink()
    forget()
    with pytest.raises(UserError, match="int4-mlp' is unknown"):
        methods.find_method("int4-mlp")
    artifact = read_artifact(out)
    assert artifact.quantization is not None
    schemes = artifact.quantization.layers
    assert artifact.kind == "int4-mlp"
    assert schemes["h.0.mlp.c_fc"].weight_bits == schemes["h.1.mlp.c_proj"].weight_bits == 4
    assert schemes["h.0.attn.c_attn"].activation == schemes["lm_head"].activation == "dynamic"
    assert_works(command, out)
    if instruction_sets():
        text = list(range(20))
        with torch.inference_mode():
            expected = build_model(artifact)(torch.tensor([text]))[0].numpy()
        logits = NativeSession(NativeModel(artifact, 1), cache="fp32").forward(text, all_logits=True)
        assert np.abs(logits - expected).max() <= ROUNDED_INPUTS * np.abs(expected).max()


def test_a_method_is_found_by_its_name_and_by_those_that_it_had() -> None:
    for older, name in {
        "dynamic": "int8-dynamic",
        "static": "int8-static",
        "static-qat": "int8-static-qat",
        "weight-only-int8": "int8-weight-only",
        "weight-only-int4": "int4-weight-only",
        "weight-only-int4-head": "int4-weight-only-head",
    }.items():
        assert methods.find_method(older) is methods.find_method(name) is methods.all_methods()[name]


def test_an_unknown_method_is_one_line(command: Command, folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("--artifact", folders["fp32"], "--method", "int8-dynamc", "--out", tmp_path / "a")
    result = command("jaxgpt-export", "quantize", *arguments)
    assert_one_line_error(result, "method 'int8-dynamc' is unknown", "did you mean int8-dynamic")


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-static", "int4-weight-only-head"])
def test_a_label_that_nobody_knows_changes_nothing(
    command: Command, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(folders[kind], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["method"] = "of another program"
    (folder / "config.json").write_text(json.dumps(config))
    certificate = read_certificate(folder)
    figures = {"parity": certificate["parity"]}
    write_certificate(folder, "of another program", certificate["origin"], figures)
    artifact, known = read_artifact(folder), read_artifact(folders[kind])
    assert artifact.kind == "of another program"
    tokens = torch.arange(20)[None]
    assert torch.equal(build_model(artifact)(tokens), build_model(known)(tokens))
    assert_works(command, folder)
