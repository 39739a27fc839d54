import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.parity import open_model
from jaxgpt_export.parity.integers import compare_integers
from safetensors.torch import load_file, save_file

from jaxgpt.shared.dataset import open_dataset, windows


def tokens_of(data: Path, rows: int = 3) -> torch.Tensor:
    return torch.from_numpy(windows(open_dataset(data).val, 64)[0][:rows])


def test_jax_and_pytorch_round_to_the_same_integers(qat_run: Path, int8_static_qat: Path, data: Path) -> None:
    found = compare_integers(open_model(qat_run), open_model(int8_static_qat), tokens_of(data))
    assert found is not None
    assert len(found.float32_layers) == 2 * 4 + 1
    assert found.weights == sum(O * I for O, I in ((96, 32), (32, 32), (128, 32), (32, 128)) * 2) + 384 * 32
    assert found.weights_differing == 0
    assert found.same_input_differing == 0
    assert found.equal_share >= 0.9999
    assert found.largest_step <= 1
    assert found.float32_share >= 0.99  # flips make flips; two layers deep they are few
    assert found.passed


def test_another_scale_is_noticed(qat_run: Path, int8_static_qat: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_static_qat, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["h.1.mlp.c_fc.input_scale"] *= 1.01
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    found = compare_integers(open_model(qat_run), open_model(tmp_path / "a"), tokens_of(data))
    assert found is not None
    assert found.same_input_differing > 0
    assert not found.passed


def test_models_without_scales_have_no_integers_to_compare(
    run: Path, qat_run: Path, fp32: Path, int8_dynamic: Path, data: Path
) -> None:
    assert compare_integers(open_model(run), open_model(int8_dynamic), tokens_of(data)) is None
    assert compare_integers(open_model(qat_run), open_model(fp32), tokens_of(data)) is None


def test_the_artifact_has_the_scales_and_the_logits_of_the_training(
    qat_run: Path, qat_fp32: Path, int8_static_qat: Path
) -> None:
    parent, artifact = read_artifact(qat_fp32), read_artifact(int8_static_qat)
    assert artifact.kind == "int8-static-qat"
    for name, scale in parent.input_scales.items():
        assert artifact.tensors[f"{name}.input_scale"] == scale
        assert float(scale) != 1.0
    certificate = json.loads((int8_static_qat / "certificate.json").read_text())
    assert certificate["parity"]["against"] == "Flax, rounded"
    # One model in two executors: integers differ by rounding edges only. Against float KL is 1e-5 and more.
    assert certificate["parity"]["kl_mean"] < 1e-6
    rounded, exact = read_probe(artifact).logits, read_probe(parent).logits
    assert float(abs(rounded - exact).max()) > 1e-3


def test_verify_recomputes_the_rounded_logits(
    command: Command, qat_run: Path, qat_fp32: Path, int8_static_qat: Path
) -> None:
    for folder in (qat_fp32, int8_static_qat):
        assert command("jaxgpt-export", "verify", "--artifact", folder, "--run", qat_run)[0] == 0


def test_the_bench_reports_the_integers(
    command: Command, run: Path, qat_run: Path, int8_static_qat: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ("--artifact", int8_static_qat, "--data", data, "--tokens", 64, "--out", tmp_path / "i.json")
    code, _, err = command("jaxgpt-bench", "integers", "--run", qat_run, *arguments)
    assert code == 0
    figures = json.loads((tmp_path / "i.json").read_text())
    assert figures["same_input_differing"] == figures["weights_differing"] == 0
    assert "commit" in figures
    assert "pass  integers: 0 of" in err
    assert_one_line_error(command("jaxgpt-bench", "integers", "--run", run, *arguments), "no integers")


def test_static_would_replace_the_trained_scales(
    command: Command, qat_fp32: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ("--artifact", qat_fp32, "--method", "int8-static", "--data", data, "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "int8-static-qat")


@pytest.mark.parametrize("damage", ["missing", "negative", "nan", "changed"])
def test_damaged_scales_are_one_line(command: Command, qat_fp32: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(qat_fp32, tmp_path / "a")
    path = tmp_path / "a" / "qat.safetensors"
    tensors = load_file(path)
    name = "h.0.mlp.c_fc.input_scale"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = {"negative": -tensors[name], "nan": tensors[name] * float("nan")}.get(
            damage, tensors[name] * 2
        )
    save_file(tensors, path)
    arguments = ("--artifact", tmp_path / "a", "--method", "int8-static-qat", "--out", tmp_path / "b")
    words = {"missing": name, "negative": "not positive", "nan": "NaN", "changed": "qat.safetensors changed"}
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), words[damage])
    assert not (tmp_path / "b").exists()
