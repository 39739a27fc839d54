import json
import os
from pathlib import Path

import jax.numpy as jnp
import jaxgpt_export.flax_run.checkpoint
import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_export.flax_run.checkpoint import hf_tensors
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.tensors import expected_tensors

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.training.model.params import init_params

CONFIG = ModelConfig(97, 24, 2, 2, 16)


def test_convert_lists_every_missing_and_unexpected_parameter() -> None:
    params = init_params(CONFIG, 0)
    del params["h.1.mlp.c_fc.kernel"], params["ln_f.bias"]
    params["h.2.ln_1.scale"] = jnp.ones(16)
    with pytest.raises(UserError) as error:
        hf_tensors(params, CONFIG)
    for name in ("h.1.mlp.c_fc.kernel", "ln_f.bias", "h.2.ln_1.scale"):
        assert name in str(error.value)


def test_converted_names_and_shapes_are_hugging_face_s_own() -> None:
    tensors = hf_tensors(init_params(CONFIG, 0), CONFIG)
    expected = expected_tensors(CONFIG, None)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (_, shape) in expected.items()
    }


def test_certificate_says_where_the_artifact_came_from(fp32: Path, run: Path) -> None:
    certificate = json.loads((fp32 / "certificate.json").read_text())
    assert certificate["kind"] == "fp32"
    assert certificate["origin"]["run"] == str(run)
    assert certificate["origin"]["step"] == 40
    assert certificate["parity"]["max_abs_logit_diff"] <= 1e-4
    assert certificate["parity"]["positions"] == 4 * 64
    assert set(certificate["origin"]["versions"]) >= {"jax", "flax", "torch", "python"}


def test_a_transposed_matrix_is_caught_and_nothing_is_written(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square matrix transposed by mistake fits every shape; only the logits show it."""
    honest = jaxgpt_export.flax_run.checkpoint.hf_tensors

    def transposed(*arguments: object) -> dict[str, object]:
        tensors = honest(*arguments)
        name = "transformer.h.0.attn.c_proj.weight"
        tensors[name] = tensors[name].T.copy()
        return tensors

    monkeypatch.setattr(jaxgpt_export.flax_run.checkpoint, "hf_tensors", transposed)
    code, _out, err = command("jaxgpt-export", "convert", "--run", run, "--out", tmp_path / "a")
    assert code == 1
    assert "FAIL" in err
    assert "differ from Flax" in err
    assert os.listdir(tmp_path) == []


def test_convert_twice_needs_overwrite_and_gives_the_same_tensors(
    command: Command, run: Path, tmp_path: Path
) -> None:
    arguments = ("--run", run, "--out", tmp_path / "a")
    assert command("jaxgpt-export", "convert", *arguments)[0] == 0
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert_one_line_error(command("jaxgpt-export", "convert", *arguments), "exists", "--overwrite")
    assert command("jaxgpt-export", "convert", *arguments, "--overwrite")[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == first
    assert os.listdir(tmp_path) == ["a"]


def test_folder_that_is_no_run_is_one_line(command: Command, tmp_path: Path, fp32: Path) -> None:
    result = command("jaxgpt-export", "convert", "--run", fp32, "--out", tmp_path / "a")
    assert_one_line_error(result, "config.json", "is an artifact", "expected a run of `jaxgpt train`")
    assert os.listdir(tmp_path) == []


def test_artifact_tensors_are_the_checkpoint_s(fp32: Path, run: Path) -> None:
    from jaxgpt.training.run.checkpoints import load_params
    from jaxgpt.training.run.folder import open_run

    _, params = load_params(open_run(run), "best")
    tensors = read_artifact(fp32).tensors
    assert (tensors["h.1.attn.c_attn.weight"] == np.asarray(params["h.1.attn.c_attn.kernel"]).T).all()
    assert (tensors["wte.weight"] == np.asarray(params["wte.embedding"])).all()
