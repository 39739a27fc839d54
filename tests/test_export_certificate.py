import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.format.model_card import write_model_card
from jaxgpt_export.format.probe import probe_positions
from safetensors.torch import load_file, save_file
from tiny_artifacts import SHAPE, tiny_artifact

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json


def verify(command: Command, folder: Path, *more: object) -> tuple[int, dict[str, object]]:
    code, out, _ = command("jaxgpt-export", "verify", "--artifact", folder, "--json", *more)
    return code, json.loads(out)


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static"])
def test_untouched_artifact_passes_with_and_without_its_run(
    command: Command, run: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    assert verify(command, folder)[0] == 0
    code, figures = verify(command, folder, "--run", run)
    assert code == 0
    assert figures["passed"] is True
    assert figures["flax_max_abs_logit_diff"] <= 1e-4


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static"])
def test_swapped_layers_fail(
    command: Command, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Two layers' matrices exchanged: every shape fits, hashes and logits do not."""
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    prefix = "transformer." if kind == "fp32" else ""
    for part in ("weight",) if kind == "fp32" else ("weight", "weight_scale"):
        a, b = (f"{prefix}h.{i}.attn.c_attn.{part}" for i in (0, 1))
        tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path, metadata={"format": "pt"})
    code, figures = verify(command, tmp_path / "a")
    assert code == 1
    assert figures["altered_files"] == ["model.safetensors"]
    assert sum(not passed for passed in figures["gates"].values()) >= 2  # the hash, and the logits


def test_one_changed_byte_is_noticed(command: Command, fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    content = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    content[-3] ^= 1  # the last bits of a float: no loss would show it
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    code, figures = verify(command, tmp_path / "a")
    assert code == 1
    assert figures["altered_files"] == ["model.safetensors"]


def test_another_run_s_logits_fail(command: Command, fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    path = tmp_path / "a" / "probe.safetensors"
    probe = load_file(path)
    save_file({**probe, "logits": probe["logits"] + 0.001 * torch.randn_like(probe["logits"])}, path)
    code, figures = verify(command, tmp_path / "a")
    assert code == 1
    assert figures["altered_files"] == ["probe.safetensors"]
    assert figures["parity"]["max_abs_logit_diff"] > 1e-4


def test_certificate_of_an_unknown_version_or_none_is_one_line(
    command: Command, fp32: Path, tmp_path: Path
) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    path = tmp_path / "a" / "certificate.json"
    certificate = json.loads(path.read_text())
    path.write_text(json.dumps({**certificate, "format_version": 7}))
    assert_one_line_error(
        command("jaxgpt-export", "verify", "--artifact", tmp_path / "a"), "format version 7"
    )
    path.unlink()
    assert_one_line_error(
        command("jaxgpt-export", "verify", "--artifact", tmp_path / "a"), "certificate.json", "missing"
    )


def test_probe_positions_fit_the_size_and_hold_both_ends() -> None:
    gpt2 = ModelConfig(vocab_size=50_257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    positions = probe_positions(4096, gpt2)
    assert positions[0] == 0
    assert positions[-1] == 4095
    assert len(positions) * 50257 * 4 <= 8_000_000
    assert len(set(positions.tolist())) == len(positions)
    wide = dataclasses.replace(gpt2, vocab_size=1000)
    assert probe_positions(1024, wide).tolist() == list(range(1024))


def test_the_probe_of_a_small_model_takes_a_quarter_of_its_float_weights() -> None:
    tiny = ModelConfig(vocab_size=2048, block_size=256, n_layer=2, n_head=2, n_embd=128)
    weight_bytes = 4 * 691_712  # of the preset tiny, counted by its training
    count = len(probe_positions(1024, tiny))
    assert weight_bytes / 5 < count * 2048 * 4 <= weight_bytes / 4


@pytest.mark.parametrize(
    "change",
    [
        {"parity": [1]},
        {"parity": {}},
        {"parity": {"max_abs_logit_diff": 0, "kl_mean": float("inf"), "kl_max": 0, "top1_agreement": 1}},
        {"origin": {}},
        {"files": []},
    ],
)
def test_a_damaged_certificate_is_one_line(
    command: Command, int8_dynamic: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    shutil.copytree(int8_dynamic, tmp_path / "a")
    path = tmp_path / "a" / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_one_line_error(command("jaxgpt-export", "verify", "--artifact", tmp_path / "a"), "is damaged")


@pytest.mark.parametrize("field", ["tokens", "positions", "logits"])
def test_a_damaged_probe_is_one_line(command: Command, fp32: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    path = tmp_path / "a" / "probe.safetensors"
    fields = load_file(path)
    fields[field] = fields[field] + (torch.nan if field == "logits" else 100_000)
    save_file(fields, path)
    assert_one_line_error(command("jaxgpt-export", "verify", "--artifact", tmp_path / "a"), "damaged")


def test_a_run_of_another_configuration_is_named(
    command: Command, fp32: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    result = command("jaxgpt-export", "verify", "--artifact", fp32, "--run", tmp_path / "run")
    assert_one_line_error(result, "does not come from")


@pytest.mark.parametrize(("name", "value"), [("kl_mean", 1e9), ("top1_agreement", -1.0)])
def test_a_certificate_that_claims_more_error_than_there_is_fails(
    command: Command, int8_static: Path, tmp_path: Path, name: str, value: float
) -> None:
    shutil.copytree(int8_static, tmp_path / "a")
    path = tmp_path / "a" / "certificate.json"
    certificate = json.loads(path.read_text())
    certificate["parity"][name] = value
    path.write_text(json.dumps(certificate))
    code, _, err = command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")
    assert code == 1
    assert "FAIL  certified KL mean" in err


def test_another_generation_config_is_noticed(command: Command, fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    code, _, err = command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")
    assert code == 1
    assert "generation_config.json" in err


def test_a_card_written_elsewhere_cannot_add_to_the_model_card(int8_dynamic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(int8_dynamic, folder)
    certificate = json.loads((folder / "certificate.json").read_text())
    certificate["origin"] |= {
        "license": "mit\n---\n# other\n![x](http://a)",
        "datasets": ["*x", "2020-01-01", "<script>", "- y: z"],
    }
    write_model_card(folder, read_artifact(folder).config, certificate)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert "license: mit--- otherxhttp//a\n" in front
    assert "- x\n- '2020-01-01'\n- script\n- y z\n" in front
    assert "<" not in body
    assert "![" not in body


@pytest.mark.parametrize("step", ["abc", "40", 1.5, True, [1]])
def test_a_step_that_is_no_whole_number_is_damage(tmp_path: Path, step: object) -> None:
    path = tiny_artifact(tmp_path) / "certificate.json"
    certificate = json.loads(path.read_text())
    for good in (None, 40):
        write_json(path, {**certificate, "origin": {"step": good}})
        assert read_certificate(path.parent)["origin"]["step"] == good
    write_json(path, {**certificate, "origin": {"step": step}})
    with pytest.raises(UserError, match=r"is damaged .*expected a whole number or null"):
        read_certificate(path.parent)


@pytest.mark.parametrize("name", ["verify", "quantize", "onnx", "program"])
def test_a_gpt2_without_a_certificate_is_told_the_way_in(command: Command, tmp_path: Path, name: str) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    folder = tiny_artifact(tmp_path, dataclasses.replace(SHAPE, n_head=1))  # ONNX Runtime takes no narrower
    for file in ("certificate.json", "probe.safetensors", "qat.safetensors"):
        (folder / file).unlink()
    out = () if name == "verify" else ("--out", tmp_path / "out.pt2")
    more = ("--method", "fp16") if name == "quantize" else ()
    found = command("jaxgpt-export", name, "--artifact", folder, *out, *more)
    assert_one_line_error(
        found, f"{folder}/certificate.json is missing", f"import-hf --source {folder} --out"
    )
    path = folder / "config.json"  # of one that import-hf does not take, as a quantized artifact's
    write_json(path, {**json.loads(path.read_text()), "model_type": "jaxgpt_gpt2", "positions": "rotary"})
    with pytest.raises(UserError, match="is missing; check the path"):
        read_certificate(folder)
