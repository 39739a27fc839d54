import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.format.scheme import Quantization
from jaxgpt_export.format.tensors import expected_tensors
from jaxgpt_export.model.build import load
from jaxgpt_export.quantize.methods import find_method
from safetensors.torch import load_file, save_file

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import find_preset

FLAX_TOLERANCE = 1e-4  # the project's bound: float32 sums in three libraries' orders


@pytest.fixture(params=["fp32", "int8_dynamic", "int8_static", "int4"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an artifact, to be damaged."""
    shutil.copytree(request.getfixturevalue(request.param), tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def a_weight(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("h.1.mlp.c_fc.bias"))


def generate(command: Command, folder: Path) -> tuple[int, str, str]:
    return command("jaxgpt-export", "generate", "--artifact", folder, "--max-new-tokens", 2)


def test_missing_tensor_is_named(command: Command, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop(a_weight(tensors)))
    assert_one_line_error(
        generate(command, copy), "missing tensors:", "h.1.mlp.c_fc.bias", "unexpected tensors: none"
    )


def test_extra_tensor_is_named(command: Command, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"h.9.surprise": torch.zeros(3)}))
    assert_one_line_error(generate(command, copy), "missing tensors: none", "h.9.surprise")


def test_what_others_saved_is_refused_with_the_command_that_takes_it(
    command: Command, fp32: Path, tmp_path: Path
) -> None:
    """OpenAI's own files have no "transformer." before the names, and Hugging Face stores halves."""
    folder = tmp_path / "gpt2"
    shutil.copytree(fp32, folder)
    edit(folder, lambda tensors: tensors.update({name: tensors[name].half() for name in tensors}))
    result = generate(command, folder)
    assert_one_line_error(result, "is float16")
    assert "import-hf" not in result[2]  # it is an artifact, and damaged
    (folder / "certificate.json").unlink()
    way = f"import-hf --source {folder} --out"
    assert_one_line_error(generate(command, folder), "is float16", way)
    names = {name: name.removeprefix("transformer.") for name in load_file(folder / "model.safetensors")}
    edit(folder, lambda tensors: [tensors.update({names[name]: tensors.pop(name)}) for name in names])
    result = generate(command, folder)
    assert_one_line_error(result, way, "missing tensors: transformer.h.0", " more; unexpected")
    assert len(result[2]) < 1500
    for name in ("gpt2", "hub:gpt2", "hub:openai-community/gpt2", "openai-community/gpt2"):
        hub = f"import-hf --source hub:{name.removeprefix('hub:')}"
        assert_one_line_error(generate(command, Path(name)), f"{name} is missing", hub, "convert")
    missing = generate(command, tmp_path / "runs")
    assert_one_line_error(missing, "is missing", "convert")
    assert "hub:" not in missing[2]
    assert_one_line_error(generate(command, folder / "config.json"), "is a file, expected an artifact folder")


def test_nan_is_named(command: Command, copy: Path) -> None:
    edit(copy, lambda tensors: tensors[a_weight(tensors)].fill_(float("nan")))
    assert_one_line_error(generate(command, copy), "h.1.mlp.c_fc.bias", "NaN")


def test_wrong_shape_and_dtype_are_named(command: Command, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({a_weight(tensors): torch.zeros(5)}))
    assert_one_line_error(generate(command, copy), "h.1.mlp.c_fc.bias", "(5,)", "expected float32 (128,)")
    edit(copy, lambda tensors: tensors.update({a_weight(tensors): torch.zeros(128, dtype=torch.float16)}))
    assert_one_line_error(generate(command, copy), "float16", "expected float32 (128,)")


def test_truncated_file_is_one_line(command: Command, copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        (copy / "model.safetensors").write_bytes(content[:size])
        assert_one_line_error(generate(command, copy), "model.safetensors", "truncated or altered")


def test_config_that_disagrees_with_the_tensors_is_one_line(command: Command, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    assert_one_line_error(generate(command, copy), "h.1.mlp.c_fc", "config.json")
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert_one_line_error(generate(command, copy), "'llama'", "expected gpt2")
    del config["n_embd"]
    (copy / "config.json").write_text(json.dumps(config))
    assert_one_line_error(generate(command, copy), "lacks n_embd")


def test_format_of_another_version_is_refused(command: Command, int8_static: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_static, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization"]["format_version"] = 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert_one_line_error(generate(command, tmp_path / "a"), "format version 1", "reads 3 and 2")


def test_scale_that_is_zero_is_refused(command: Command, int8_static: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_static, tmp_path / "a")
    edit(tmp_path / "a", lambda tensors: tensors["h.0.attn.c_attn.weight_scale"].fill_(0))
    assert_one_line_error(generate(command, tmp_path / "a"), "h.0.attn.c_attn.weight_scale", "not positive")


def test_tokenizer_of_another_model_is_one_line(command: Command, copy: Path) -> None:
    from jaxgpt.data.make_tokenizer import make_tokenizer

    make_tokenizer("bpe:300", ["other text " * 100]).save(copy)
    (copy / "certificate.json").unlink()  # which would name the files that changed
    assert_one_line_error(generate(command, copy), "tokenizer", "tokens, the model 384", "two models")


def test_fp32_artifact_in_transformers_gives_flax_logits(fp32: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(fp32)
    assert type(model).__name__ == "GPT2LMHeadModel"
    probe = read_probe(read_artifact(fp32))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(probe.tokens).long()).logits.flatten(0, 1)[probe.positions]
    assert float(abs(logits.numpy() - probe.logits).max()) <= FLAX_TOLERANCE
    assert len(probe.positions) == probe.tokens.size == 4 * 64


def test_fp32_artifact_has_the_tokenizer_that_transformers_reads(fp32: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(fp32)
    ours = read_artifact(fp32).tokenizer()
    text = "Write a function to add the total by the count ```python\ndef f(x):\n    return x  # 日本\n```"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.endoftext


def test_other_loaders_refuse_an_int8_artifact(int8_dynamic: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="jaxgpt_gpt2"):
        transformers.AutoModelForCausalLM.from_pretrained(int8_dynamic)


def test_load_returns_a_module_that_gives_logits(copy: Path) -> None:
    model = load(copy)
    assert isinstance(model, torch.nn.Module)
    logits = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert logits.shape == (2, 3, 384)


def test_a_124m_int8_model_fits_into_127_mb() -> None:
    config = find_preset("gpt2").model(50257)
    smooth = (*(f"h.{i}.mlp.c_proj" for i in range(12)), "wte")
    schemes = {
        name: dataclasses.replace(scheme, smoothing=name in smooth)
        for name, scheme in find_method("int8-static").schemes(config).items()
    }
    expected = expected_tensors(config, Quantization("int8-static", schemes))
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())
    header = 200 * len(expected)  # safetensors writes name, dtype, shape and offsets of each as JSON
    assert size + header <= 127e6


def test_int8_file_is_smaller_than_a_quarter_and_a_bit(fp32: Path, int8_dynamic: Path) -> None:
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (int8_dynamic, fp32))
    assert small < 0.45 * large  # at 32 channels scales, biases and the header weigh much
    matrices = [
        t
        for n, t in load_file(int8_dynamic / "model.safetensors").items()
        if n.endswith(".weight") and t.ndim == 2
    ]
    assert all(tensor.dtype == torch.int8 for tensor in matrices)
    assert len(matrices) == 2 + 2 * 4  # wte, wpe and four matrices a block; the head has none of its own


@pytest.mark.parametrize(
    ("name", "value"), [("layer_norm_epsilon", 0.5), ("activation_function", "relu"), ("n_inner", 7)]
)
def test_a_setting_that_would_be_ignored_is_refused(
    fp32: Path, tmp_path: Path, name: str, value: object
) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=name):
        read_artifact(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "certificate.json", "merges.txt", "model.safetensors"])
@pytest.mark.parametrize("what", ["folder", "nowhere", "itself"])
def test_a_file_that_is_a_folder_or_a_bad_link_is_one_line(
    command: Command, int8_static: Path, tmp_path: Path, name: str, what: str
) -> None:
    shutil.copytree(int8_static, tmp_path / "a")
    path = tmp_path / "a" / name
    path.unlink()
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if what == "itself" else "nowhere")
    assert_one_line_error(generate(command, tmp_path / "a"), name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_layer": 2**31}, "n_layer (2147483648) must be at most 4096"),
        ({"n_embd": 10**400}, "must be at most 32768"),
        ({"n_embd": "32"}, "has n_embd '32', expected a whole number"),
        ({"n_layer": True}, "has n_layer True, expected a whole number"),
        ({"model_type": "a\nb" * 10_000}, "expected gpt2 or jaxgpt_gpt2"),
        ({"positions": ["rotary"]}, "has positions ['rotary'], expected learned or rotary"),
        ({"quantization": {"format_version": [[]] * 1000}}, "this program reads 3 and 2"),
    ],
)
def test_a_value_that_no_config_has_is_one_short_line(
    command: Command, int8_static: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    shutil.copytree(int8_static, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    code, out, err = generate(command, tmp_path / "a")
    assert_one_line_error((code, out, err), words)
    assert len(err) < 1000


def test_a_message_is_one_line_however_long_a_damaged_file_is() -> None:
    message = str(UserError("a\nb" * 10_000))
    assert "\n" not in message
    assert len(message) < 4100
