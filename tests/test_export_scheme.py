"""The section `quantization` of config.json: version 2 is read, and what no artifact has is one line."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.scheme import LayerScheme, Quantization, read_quantization
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.native_model import unsupported_reason
from jaxgpt_export.quantize.methods import find_method
from tiny_artifacts import KINDS, tiny_artifacts

from jaxgpt.shared.architecture import matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError

Section = dict[str, Any]

METHOD_IN_VERSION_2 = {
    "int8-dynamic": "dynamic",
    "int8-static": "static",
    "int8-static-qat": "static-qat",
    "int8-weight-only": "weight-only-int8",
    "int4-weight-only": "weight-only-int4",
    "int4-weight-only-head": "weight-only-int4-head",
}
QUANTIZED = [kind for kind in KINDS if kind != "fp32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_artifacts(tmp_path_factory.mktemp("scheme"))


def edited(folder: Path, out: Path, change: Callable[[Section], object]) -> Path:
    """Copy an artifact and change its section `quantization`; it has no certificate then."""
    shutil.copytree(folder, out)
    (out / "certificate.json").unlink()
    path = out / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization"])
    path.write_text(json.dumps(config))
    return out


def to_version_2(section: Section, config: ModelConfig) -> None:
    """Rewrite a section as version 2 wrote it."""
    layers = section.pop("layers")
    section |= {
        "format_version": 2,
        "method": METHOD_IN_VERSION_2[section["method"]],
        "bits": {name: layers[name]["weight_bits"] for name in matrices(config)},
        "group_size": max(scheme["group_size"] for scheme in layers.values()),
        "smooth": [name for name, scheme in layers.items() if scheme["smoothing"]],
        "fine": [name for name, scheme in layers.items() if scheme["two_level"]],
    }


@pytest.mark.parametrize("kind", QUANTIZED)
def test_version_2_is_read_to_the_same_schemes_and_bits(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    artifact = read_artifact(folders[kind])
    older = edited(folders[kind], tmp_path / "a", lambda section: to_version_2(section, artifact.config))
    found = read_artifact(older)
    assert found.quantization == artifact.quantization
    tokens = torch.arange(20)[None]
    assert torch.equal(build_model(found)(tokens), build_model(artifact)(tokens))
    if kind == "int8-dynamic":
        section = json.loads((older / "config.json").read_text())["quantization"]
        assert sorted(section["smooth"]) == ["h.0.mlp.c_proj", "wte"]
        assert len(section["fine"]) == 3


def test_version_2_of_every_method_gives_the_method_s_schemes(tmp_path: Path) -> None:
    for tied in (True, False):
        config = ModelConfig(300, 32, 2, 2, 32, tied=tied)
        for name, older in METHOD_IN_VERSION_2.items():
            expected = Quantization(name, find_method(name).schemes(config))
            section = json.loads(json.dumps(expected.to_json()))
            to_version_2(section, config)
            assert section["method"] == older
            assert read_quantization(section, config, tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "weight-only-int3"}, "weight-only-int3"),
        ({"method": "dynamic"}, "the input of h.0.attn.c_attn can't be rounded"),
        ({"bits": {"wte": 8}}, "disagree on the layers h.0.attn.c_attn"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 7}, "group_size 7"),
        ({"smooth": ["wte"]}, "smoothing of wte"),
        ({"fine": ["lm_head"]}, "inputs of lm_head are not rounded, so not twice"),
        ({"smooth": ["h.9.mlp.c_proj"]}, "h.9.mlp.c_proj, which are no layers"),
        ({"surprise": 1}, "unknown fields"),
        ({"bits": 7}, "config.json"),
    ],
)
def test_a_section_of_version_2_that_no_artifact_has_is_one_line(
    command: Command, folders: dict[str, Path], tmp_path: Path, fields: Section, words: str
) -> None:
    source = folders["int4-weight-only"]

    def change(section: Section) -> None:
        to_version_2(section, read_artifact(source).config)
        section |= fields

    folder = edited(source, tmp_path / "a", change)
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", folder), words)


def test_bits_of_version_2_are_whole_numbers(
    command: Command, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = folders["int8-static"]

    def change(section: Section) -> None:
        to_version_2(section, read_artifact(source).config)
        section["bits"]["wte"] = 8.0

    result = command("jaxgpt-export", "generate", "--artifact", edited(source, tmp_path / "a", change))
    assert_one_line_error(result, "config.json is damaged", "quantize the fp32 artifact again")


@pytest.mark.parametrize(
    ("kind", "layer", "fields", "words"),
    [
        ("int8-dynamic", "wte", {"surprise": 1}, "the scheme of wte has, or lacks, surprise"),
        ("int8-dynamic", "wte", {"weight_bits": True}, "weight_bits of wte is True"),
        ("int8-dynamic", "wte", {"weight_bits": "8"}, "weight_bits of wte is '8'"),
        ("int8-dynamic", "wte", {"weight_bits": 8.0}, "weight_bits of wte is 8.0"),
        ("int8-dynamic", "wte", {"weight_bits": 7}, "weight_bits of wte is 7, expected 4, 8, 16 or 32"),
        ("int8-dynamic", "wte", {"smoothing": 1}, "smoothing of wte is 1"),
        ("int8-dynamic", "wte", {"group_size": 8}, "wte has 8 bits and a group_size"),
        ("int8-dynamic", "wpe", {"activation": "dynamic"}, "the input of wpe can't be rounded"),
        ("int8-dynamic", "wpe", {"smoothing": True}, "smoothing of wpe is not kept by any layer"),
        ("int8-dynamic", "lm_head", {"activation": "x"}, "activation of lm_head is 'x'"),
        ("int8-dynamic", "lm_head", {"activation": None}, "activation of lm_head is None"),
        ("int8-dynamic", "lm_head", {"smoothing": True}, "smoothing of lm_head is not kept by any layer"),
        ("int8-dynamic", "h.1.mlp.c_fc", {"smoothing": True}, "smoothing of h.1.mlp.c_fc is not kept"),
        ("int8-dynamic", "h.1.mlp.c_proj", {"two_level": 0}, "two_level of h.1.mlp.c_proj is 0"),
        ("int8-weight-only", "lm_head", {"two_level": True}, "inputs of lm_head are not rounded, so not"),
        ("int8-weight-only", "h.0.mlp.c_proj", {"smoothing": True}, "smoothing of h.0.mlp.c_proj is not"),
        ("int8-weight-only", "lm_head", {"weight_bits": 32}, "the head is wte, their schemes give"),
        ("int4-weight-only", "h.0.attn.c_attn", {"group_size": 7}, "group_size 7 does not divide"),
        ("int4-weight-only", "h.0.attn.c_attn", {"group_size": 0}, "group_size 0 does not divide"),
        ("int4-weight-only", "h.0.attn.c_attn", {"group_size": -8}, "group_size -8 does not divide"),
        ("int4-weight-only", "h.0.attn.c_attn", {"activation": "static"}, "h.0.attn.c_attn can't be rounded"),
        ("int4-weight-only-head", "lm_head", {"group_size": 4}, "the head is wte"),
    ],
)  # fmt: skip
def test_a_scheme_that_no_layer_has_is_one_line(
    command: Command,
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    layer: str,
    fields: Section,
    words: str,
) -> None:
    folder = edited(folders[kind], tmp_path / "a", lambda section: section["layers"][layer].update(fields))
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", folder), "config.json", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["layers"].pop("h.0.attn.c_attn"), "shape disagree on the layers h.0.attn.c_attn"),
        (lambda s: s["layers"].pop("lm_head"), "schemes and shape disagree on the layers lm_head"),
        (lambda s: s["layers"].update({"h.9.x": s["layers"]["wte"]}), "disagree on the layers h.9.x"),
        (lambda s: s["layers"].update(wte=8), "config.json is damaged"),
        (lambda s: s["layers"]["wte"].pop("two_level"), "the scheme of wte has, or lacks, two_level"),
        (lambda s: s.update(layers=7), "config.json is damaged"),
        (lambda s: s.pop("layers"), "config.json is damaged"),
        (lambda s: s.update(surprise=1), "unknown fields"),
        (lambda s: s.update(method=7), "method is 7, expected a name"),
        (lambda s: s.update(method=""), "method is '', expected a name"),
        (lambda s: s.update(method="x" * 65), "expected a name"),
        (lambda s: s.update(format_version=4), "format version 4, this program reads 3 and 2"),
        (lambda s: s.update(format_version="3"), "format version '3', this program reads 3 and 2"),
        (lambda s: s.update(format_version=2), "quantization method 'int8-weight-only' is unknown"),
    ],
)  # fmt: skip
def test_a_section_that_no_artifact_has_is_one_line(
    command: Command,
    folders: dict[str, Path],
    tmp_path: Path,
    change: Callable[[Section], object],
    words: str,
) -> None:
    folder = edited(folders["int8-weight-only"], tmp_path / "a", change)
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", folder), "config.json", words)


@pytest.mark.parametrize(
    ("config", "method", "size", "words"),
    [
        (ModelConfig(300, 32, 1, 3, 9), "int4-weight-only-head", 3, "an even number of inputs"),
        (ModelConfig(300, 32, 1, 2, 8), "int4-weight-only", 3, "group_size 3"),
    ],
)
def test_groups_that_no_bytes_hold_are_refused(
    config: ModelConfig, method: str, size: int, words: str, tmp_path: Path
) -> None:
    even = dataclasses.replace(config, n_head=1, n_embd=8)
    schemes = {
        name: dataclasses.replace(scheme, group_size=size if scheme.weight_bits == 4 else 0)
        for name, scheme in find_method(method).schemes(even).items()
    }
    with pytest.raises(UserError, match=words):
        read_quantization(Quantization(method, schemes).to_json(), config, tmp_path / "config.json")


def test_the_engine_leaves_4_bit_rows_that_are_no_head_to_the_module(folders: dict[str, Path]) -> None:
    artifact = read_artifact(folders["int8-weight-only"])
    assert artifact.quantization is not None
    four = LayerScheme(weight_bits=4, group_size=8)
    quantization = Quantization("other", {**artifact.quantization.layers, "wpe": four})
    reason = unsupported_reason(dataclasses.replace(artifact, quantization=quantization))
    assert "the rows of wpe have 4 bits" in str(reason) or "not built" in str(reason)
