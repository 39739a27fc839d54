import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error, rows, write_jsonl
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.model.arithmetic import pack_int4, quantize_rows, scale_of
from jaxgpt_export.model.build import as_array, as_tensors, build_model, float_model
from jaxgpt_export.quantize.activation import (
    STRENGTHS,
    ActivationQuant,
    Search,
    search_scale,
    smoothing_vector,
)
from jaxgpt_export.quantize.calibration import LayerInput, collect_inputs
from jaxgpt_export.quantize.command import QUALITY_TOKENS
from jaxgpt_export.quantize.gptq import round_groups
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.quantizer import CALIBRATION_TOKENS, spread_windows
from jaxgpt_export.quantize.smoothing import fold_smoothing
from jaxgpt_export.quantize.state_dict import quantized_state_dict

from jaxgpt.shared.architecture import HEAD, linear_layers, matrices
from jaxgpt.shared.config import CLIPPING_SHARES, ModelConfig
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=2, n_head=4, n_embd=32)
MEASURED_AGAIN = 1e-6  # nats: float32 sums of windows that ran one at a time here, in fours there
# Mean KL from float, nats: five times what was measured, 1.8e-6, 2.8e-6, 1.2e-6 and 2.6e-5. Another processor
# trains another model, and its calibration may choose otherwise; one bit less gives four times as much.
MAX_KL = {"int8_dynamic": 1e-5, "int8_static": 1.5e-5, "int8_weight_only": 6e-6, "int4": 1.5e-4}


def test_folded_smoothing_leaves_the_float_model_unchanged() -> None:
    tensors = {name: tensor * 5 for name, tensor in random_tensors(CONFIG).items()}
    generator = torch.Generator().manual_seed(0)
    widths = {name: layer.inputs for name, layer in linear_layers(CONFIG).items()}
    smooth = {name: torch.rand(I, generator=generator) * 3 + 0.2 for name, I in widths.items()}
    folded, kept = fold_smoothing(CONFIG, tensors, smooth)
    assert set(kept) == {"h.0.mlp.c_proj.smooth", "h.1.mlp.c_proj.smooth", "wte.smooth"}
    # What the artifact does at run time with the vectors that stay, in float:
    model = float_model(CONFIG, folded)
    for i, block in enumerate(model.h):
        block.mlp.c_proj.register_forward_pre_hook(lambda m, a, i=i: (a[0] / smooth[f"h.{i}.mlp.c_proj"],))
    model.wte.register_forward_hook(lambda m, a, out: out / smooth[HEAD])
    tokens = torch.randint(97, (2, 24), generator=generator)
    with torch.no_grad():
        expected = float_model(CONFIG, tensors)(tokens)
        # float32; every weight was multiplied and divided once
        assert float((model(tokens) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not torch.equal(folded["h.0.attn.c_attn.weight"], tensors["h.0.attn.c_attn.weight"])


def seen(x: torch.Tensor) -> LayerInput:
    """What calibration keeps of these inputs."""
    return LayerInput(x.abs().amax(dim=0), x, x.t() @ x)


def outlier_layer() -> tuple[LayerInput, torch.Tensor]:
    """An input with one channel 100 times the rest, as trained language models have them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x[:, 5] *= 100
    weight = torch.randn(48, 64, generator=generator) * 0.1
    return seen(x), weight


def output_error(plan: ActivationQuant, layer: LayerInput, weight: torch.Tensor) -> float:
    """Relative output error of a plan, with integers in int64, apart from the code under test."""
    x = layer.sample if plan.smooth is None else layer.sample / plan.smooth
    q_w, s_w = quantize_rows(weight if plan.smooth is None else weight * plan.smooth)
    q_x = torch.round(x / plan.scale).clamp(-127, 127).long()
    y = (q_x @ q_w.long().t()).double() * float(plan.scale) * s_w.double()
    exact = layer.sample.double() @ weight.double().t()
    return float((y - exact).square().mean() / exact.square().mean())


def test_smoothing_saves_what_a_plain_maximum_ruins() -> None:
    layer, weight = outlier_layer()
    naive = search_scale(layer, weight, Search(covered=(1.0,)))
    best = search_scale(layer, weight, Search(covered=CLIPPING_SHARES, strengths=STRENGTHS))
    assert best.smooth is not None
    for plan in (naive, best):
        assert output_error(plan, layer, weight) == pytest.approx(plan.error, rel=0.02)
    # Without the outlier channel's share of the output, what is left is rounded to almost nothing.
    assert best.error < naive.error / 10


def test_plan_is_the_best_of_all_that_were_to_try() -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(20_000, 16, generator=generator) - 0.5
    x = -u.sign() * torch.log1p(-2 * u.abs() + 1e-7)  # Laplace: long tails that are rare, so clipping pays
    layer, weight = seen(x), torch.randn(8, 16, generator=generator)
    plans = [search_scale(layer, weight, Search(covered=(share,))) for share in CLIPPING_SHARES]
    best = search_scale(layer, weight, Search(covered=CLIPPING_SHARES))
    assert best.error == min(plan.error for plan in plans) < plans[0].error


def test_smoothing_vector_evens_out_and_survives_dead_channels() -> None:
    layer, weight = outlier_layer()
    largest = layer.largest.clone()
    largest[7] = 0
    vector = smoothing_vector(largest, weight, 0.5)
    assert bool(torch.isfinite(vector).all())
    assert bool((vector > 0).all())
    smoothed = largest / vector
    assert float(smoothed.max() / smoothed[smoothed > 0].median()) < 15  # it was about 100


def test_calibration_sees_the_largest_inputs_of_every_layer() -> None:
    model = float_model(CONFIG, random_tensors(CONFIG))
    tokens = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(0)).int()
    inputs = collect_inputs(model, tokens)
    assert set(inputs) == set(linear_layers(CONFIG))
    with torch.no_grad():
        x = model.h[0].ln_1(model.wte(tokens.long()) + model.wpe(torch.arange(24)))
    # The model runs row by row here, in one batch there: the same float32 sums but for their order.
    torch.testing.assert_close(
        inputs["h.0.attn.c_attn"].largest, x.abs().amax(dim=(0, 1)), rtol=1e-5, atol=1e-6
    )
    assert float(inputs["h.0.attn.c_attn"].sample.abs().max()) == float(
        inputs["h.0.attn.c_attn"].largest.max()
    )


def test_nan_in_calibration_names_the_layer() -> None:
    tensors = random_tensors(CONFIG)
    tensors["h.1.ln_2.weight"] = torch.full((32,), float("nan"))
    with pytest.raises(UserError, match=r"input of h\.1\.mlp\.c_fc holds NaN"):
        collect_inputs(float_model(CONFIG, tensors), torch.zeros(1, 8, dtype=torch.int32))


@pytest.fixture
def plain(command: Command, fp32: Path, tmp_path: Path) -> Path:
    """An artifact that follows from the weights alone: no calibration text was given."""
    arguments = ("--artifact", fp32, "--method", "int8-weight-only", "--out", tmp_path / "plain")
    assert command("jaxgpt-export", "quantize", *arguments)[0] == 0
    return tmp_path / "plain"


def test_artifact_holds_the_integers_of_the_module(fp32: Path, plain: Path) -> None:
    parent, artifact = read_artifact(fp32), read_artifact(plain)
    tensors = as_tensors(parent.tensors)
    for name in matrices(parent.config):
        q, scale = quantize_rows(tensors[f"{name}.weight"])
        assert np.array_equal(artifact.tensors[f"{name}.weight"], as_array(q))
        assert np.array_equal(artifact.tensors[f"{name}.weight_scale"], as_array(scale))
    schemes = find_method("int8-weight-only").schemes(parent.config)
    made = quantized_state_dict(parent.config, tensors, "int8-weight-only", schemes)
    assert made.quantization == artifact.quantization
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(made.model(parent.config)(tokens), build_model(artifact)(tokens))


@pytest.mark.parametrize(
    ("method", "bound"),
    [("int8_dynamic", 0.003), ("int8_static", 0.02), ("int8_weight_only", 0.0005), ("int4", 0.03)],
)
def test_loss_increase_and_kl_are_small_and_recorded(
    method: str, bound: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(method)
    certificate = json.loads((folder / "certificate.json").read_text())
    assert abs(certificate["quality"]["loss_increase"]) <= bound
    assert 0 < certificate["quality"]["against_float"]["kl_mean"] <= MAX_KL[method]
    assert certificate["quality"]["tokens"] > 3000
    assert certificate["kind"] == read_artifact(folder).kind
    observers = {
        "int8_dynamic": {"plain", "smoothed"},
        "int8_static": {"min-max", "clipped", "clipped-smoothed"},
    }
    if method in observers:
        tried = set(certificate["calibration"]["observers"])
        best = {name.partition(",")[0] for name in tried}
        assert best == observers[method]
        assert sum(name.endswith(", gptq") for name in tried) == 1
        assert sum(name.endswith(", gptq, fine") for name in tried) == 1
        kl = {name: row["kl_mean"] for name, row in certificate["calibration"]["observers"].items()}
        assert certificate["calibration"]["observer"] == min(kl, key=lambda name: kl[name])


def validation_log_p(artifact: Path, inputs: np.ndarray) -> torch.Tensor:
    """Log-probabilities (N, V) of what follows each token of windows, in float64."""
    model = build_model(read_artifact(artifact))
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(row[None]).long())[0] for row in inputs])
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("method", ["int8_static", "int4"])
def test_the_certified_quality_is_what_both_artifacts_give_on_the_validation_text(
    method: str, fp32: Path, data: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(method)
    quality = json.loads((folder / "certificate.json").read_text())["quality"]
    block_size = read_artifact(fp32).config.block_size
    inputs, targets = (
        each[: QUALITY_TOKENS // block_size] for each in open_dataset(data).val_windows(block_size)
    )
    counted = torch.from_numpy(targets.ravel() >= 0)
    wanted = torch.from_numpy(targets.ravel()).long()[counted, None]
    before, after = (validation_log_p(each, inputs)[counted] for each in (fp32, folder))
    losses = [-float(log_p.gather(1, wanted).mean()) for log_p in (before, after)]
    assert quality["tokens"] == len(wanted)
    assert [quality["float_loss"], quality["quantized_loss"]] == pytest.approx(losses, abs=MEASURED_AGAIN)
    assert quality["loss_increase"] == pytest.approx(losses[1] - losses[0], abs=MEASURED_AGAIN)
    assert quality["loss_increase"] != 0
    kl = float((before.exp() * (before - after)).sum(dim=1).mean())
    assert quality["against_float"]["kl_mean"] == pytest.approx(kl, rel=1e-3)
    assert kl > 100 * MEASURED_AGAIN**2


def test_an_observer_that_is_named_is_taken_and_certified(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    parent = read_artifact(fp32)
    tensors = as_tensors(parent.tensors)
    for method, observer, *more in (
        ("int8-static", "min-max", "--data", data),
        ("int4-weight-only", "nearest"),
    ):
        arguments = ("--artifact", fp32, "--method", method, "--observer", observer, *more)
        assert command("jaxgpt-export", "quantize", *arguments, "--out", tmp_path / method)[0] == 0
        certificate = json.loads((tmp_path / method / "certificate.json").read_text())
        assert certificate["calibration"] == {"observer": observer}
    T = parent.config.block_size
    text = spread_windows(open_dataset(data).train, T, CALIBRATION_TOKENS // T, 0)
    found = read_artifact(tmp_path / "int8-static").tensors
    for name, layer in collect_inputs(float_model(parent.config, tensors), text).items():
        assert found[f"{name}.input_scale"] == as_array(scale_of(layer.largest.max())), name
    found = read_artifact(tmp_path / "int4-weight-only").tensors
    q, _, _ = round_groups(tensors["h.0.mlp.c_fc.weight"], 32)
    assert np.array_equal(found["h.0.mlp.c_fc.weight_packed"], as_array(pack_int4(q)))


def test_an_observer_that_no_method_has_is_one_line(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    for method, observer, more, words in (
        ("int8-static", "best", (), ("int8-static has no observer 'best'", "min-max, clipped, ")),
        ("fp16", "min-max", (), ("'min-max'", "expected none at all")),
        ("auto", "min-max", (), ("--observer", "--method is auto")),
        (
            "int8-static",
            "min-max",
            ("--high-precision-layers", 1),
            ("--observer and --high-precision-layers",),
        ),
    ):
        arguments = ("--artifact", fp32, "--data", data, "--method", method, "--observer", observer, *more)
        refused = command("jaxgpt-export", "quantize", *arguments, "--out", tmp_path / "a")
        assert_one_line_error(refused, *words)
    assert os.listdir(tmp_path) == []


def test_int8_artifact_can_not_be_quantized_again(
    command: Command, int8_dynamic: Path, tmp_path: Path
) -> None:
    arguments = ("--artifact", int8_dynamic, "--method", "int8-dynamic", "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "int8-dynamic", "float32")


def test_static_without_data_is_one_line(command: Command, fp32: Path, tmp_path: Path) -> None:
    arguments = ("--artifact", fp32, "--method", "int8-static", "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "--data")
    assert os.listdir(tmp_path) == []


def test_dynamic_needs_no_data(command: Command, fp32: Path, plain: Path, tmp_path: Path) -> None:
    arguments = ("--artifact", fp32, "--method", "int8-dynamic", "--out", tmp_path / "a")
    assert command("jaxgpt-export", "quantize", *arguments)[0] == 0
    content = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "a", plain)]
    assert content[0] == content[1]


def test_a_smoothed_dynamic_layer_is_nearer_where_a_channel_stands_out() -> None:
    layer, weight = outlier_layer()
    plain = search_scale(layer, weight, Search())
    best = search_scale(layer, weight, Search(strengths=STRENGTHS))
    assert plain.scale is best.scale is None
    assert best.smooth is not None
    assert best.error < plain.error / 10


def test_smoothing_undoes_what_was_scaled_up_and_down() -> None:
    """A model with outliers that do not change its function is rounded as it was without them."""
    layer, weight = outlier_layer()
    factor = torch.ones(64)
    factor[[9, 20]] = torch.tensor([100.0, 30.0])
    scaled = seen(layer.sample * factor)
    for covered in ((), CLIPPING_SHARES):
        search = Search(covered=covered, strengths=STRENGTHS)
        before = search_scale(layer, weight, search)
        after = search_scale(scaled, weight / factor, search)
        assert after.error == pytest.approx(before.error, rel=0.01)


def assert_static_refuses(command: Command, fp32: Path, folder: Path, *words: str) -> None:
    arguments = (
        "--artifact",
        fp32,
        "--method",
        "int8-static",
        "--data",
        folder / "d",
        "--out",
        folder / "out",
    )
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), *words)
    assert not (folder / "out").exists()


def test_calibration_data_of_another_tokenizer_is_one_line(
    command: Command, fp32: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", rows(100, seed=3))
    arguments = ("--source", source, "--tokenizer", "bpe:300", "--val-fraction", 0.3, "--out", tmp_path / "d")
    assert command("jaxgpt", "prepare", *arguments)[0] == 0
    assert_static_refuses(command, fp32, tmp_path, "another tokenizer")


def test_too_little_calibration_text_is_one_line(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "d")
    tokens = np.fromfile(data / "train.bin", np.uint16)[:1000]
    tokens.tofile(tmp_path / "d" / "train.bin")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["train.bin"] = {"bytes": 2000, "sha256": sha256_of(tmp_path / "d" / "train.bin")}
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    assert_static_refuses(command, fp32, tmp_path, "has 1000 tokens", "at least 1024")


def test_an_altered_parent_is_not_certified(command: Command, fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    content = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    arguments = ("--artifact", tmp_path / "a", "--method", "int8-dynamic", "--out", tmp_path / "out")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "model.safetensors changed")
    assert not (tmp_path / "out").exists()
    arguments = ("--artifact", fp32, "--method", "int8-dynamic", "--out", fp32, "--overwrite")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "which is read")
