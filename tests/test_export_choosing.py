import copy
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import read_artifact, write_artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import as_arrays
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.parity.metrics import Parity
from jaxgpt_export.parity.quality import Quality, measure_quality
from jaxgpt_export.quantize import speed as speed_module
from jaxgpt_export.quantize.auto import choose, high_precision_layers, table_row
from jaxgpt_export.quantize.calibration import collect_inputs
from jaxgpt_export.quantize.command import _quality
from jaxgpt_export.quantize.layer_order import round_in_order
from jaxgpt_export.quantize.methods import Method, find_method, uniform_schemes
from jaxgpt_export.quantize.quantizer import Quantizer, spread_windows
from jaxgpt_export.quantize.sensitivity import sensitivity, worst_layers
from jaxgpt_export.quantize.speed import Speed, measure_speed
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError


@pytest.fixture
def quantizer(fp32: Path, data: Path) -> Quantizer:
    return Quantizer(read_artifact(fp32), open_dataset(data))


def last_json(output: str) -> dict[str, object]:
    return json.loads(output.strip().splitlines()[-1])


def test_only_one_layer_is_rounded(quantizer: Quantizer) -> None:
    made = quantizer.only(find_method("int8-static").apply(quantizer), "h.1.mlp.c_fc")
    schemes = made.quantization.layers.items()
    assert {name for name, scheme in schemes if scheme.weight_bits == 8} == {"h.1.mlp.c_fc"}
    assert [name for name in made.tensors if name.endswith("input_scale")] == ["h.1.mlp.c_fc.input_scale"]
    tokens = torch.tensor([[1, 2, 3]])
    # In float64, as what lies between the layers is float64 in the one and float32 in the other.
    reference, model = copy.deepcopy(quantizer.reference).double(), made.model(quantizer.config).double()
    assert torch.equal(model.h[0](model.wte(tokens)), reference.h[0](reference.wte(tokens)))
    assert not torch.equal(model(tokens), reference(tokens))


def test_sensitivity_names_the_layer_that_was_made_hard_to_round(quantizer: Quantizer) -> None:
    tensors = quantizer.artifact.tensors
    tensors["h.1.mlp.c_fc.weight"][:, 3] *= 2000  # the other channels of a row round to 0
    for part in ("weight", "bias"):  # the same function
        tensors[f"h.1.ln_2.{part}"][3] /= 2000
    hard = Quantizer(quantizer.artifact, quantizer._dataset)
    rows = sensitivity(hard, find_method("int8-weight-only").apply(hard))
    assert rows[0]["layer"] == "h.1.mlp.c_fc"
    assert rows[0]["kl_mean"] > 10 * rows[1]["kl_mean"]
    assert [row["kl_mean"] for row in rows] == sorted((row["kl_mean"] for row in rows), reverse=True)


@pytest.mark.slow
def test_auto_takes_the_first_within_the_bound_from_the_cheapest_on(quantizer: Quantizer) -> None:
    def cost(model: torch.nn.Module):
        return _quality(quantizer.reference, model, quantizer._dataset)

    made, rows = choose(quantizer, cost, 1.0)
    assert made is not None
    assert [row["method"] for row in rows] == ["int4-weight-only-head"]
    made, rows = choose(quantizer, cost, -1.0)  # no rounding makes the loss so much better
    assert made is None
    assert [row["method"] for row in rows] == [
        "int4-weight-only-head",
        "int4-dynamic-head",
        "int4-weight-only",
        "int4-dynamic",
        "int8-static",
        "int8-dynamic",
        "int8-weight-only",
    ] * 2
    assert [len(row["kept"]) for row in rows] == [0] * 7 + [1] * 7


class CheapMethod(Method):
    """Rounds weights to 8 bits, under another name."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        return uniform_schemes(config, "float")

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        return quantizer.candidate(self.name, schemes)


def quality_of(loss: float, kl: float) -> Quality:
    return Quality(loss, 1000, Parity(0.0, 0.0, kl, kl, 1.0), None, (loss,), (1000,))


def test_auto_passes_over_what_costs_more_than_the_bound(
    quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that the loss rises by, then one that it falls by; nothing is measured but by `costs`."""
    methods: list[Method] = [CheapMethod(name) for name in ("cheapest", "dearer", "dearest")]
    costs = iter([(2.0, 2.02), (2.0, 2.005), (2.0, 2.0)])
    monkeypatch.setattr("jaxgpt_export.quantize.auto.cheapest_first", lambda _: methods)
    monkeypatch.setattr("jaxgpt_export.quantize.auto.try_speed", lambda *_: Speed(1.0, "native", None))

    def measure(_: torch.nn.Module) -> tuple[Quality, Quality]:
        before, after = next(costs)
        return quality_of(before, 0.0), quality_of(after, 0.125)

    made, rows = choose(quantizer, measure, 0.01)
    assert made is not None
    assert made.quantization.method == "dearer"
    assert [row["method"] for row in rows] == ["cheapest", "dearer"]
    assert [row["loss_increase"] for row in rows] == pytest.approx([0.02, 0.005])
    assert [row["kl_mean"] for row in rows] == [0.125, 0.125]


def test_candidates_are_compared_on_text_that_calibration_did_not_see(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of the training split is another one, and so names its place."""
    config = ModelConfig(vocab_size=1500, block_size=24, n_layer=1, n_head=2, n_embd=16)
    content = to_hf_layout(as_arrays(random_tensors(config)), config)
    write_artifact(tmp_path, config, None, content, placeholder_tokenizer(config.vocab_size))
    train = np.arange(1500, dtype=np.uint16)
    seen: dict[str, set[int]] = {"calibration": set(), "gptq": set(), "choice": set()}
    collect, in_order, measured = collect_inputs, round_in_order, measure_quality

    def collecting(model: torch.nn.Module, tokens: torch.Tensor) -> object:
        seen["calibration"] |= set(tokens.flatten().tolist())
        return collect(model, tokens)

    def rounding(config: ModelConfig, tensors: object, tokens: torch.Tensor, *more: object) -> None:
        seen["gptq"] |= set(tokens.flatten().tolist())
        in_order(config, tensors, tokens, *more)

    def measuring(models: object, windows: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> object:
        found = list(windows)
        seen["choice"] |= {token for pair in found for part in pair for token in part.flatten().tolist()}
        return measured(models, found)

    monkeypatch.setattr("jaxgpt_export.quantize.quantizer.collect_inputs", collecting)
    monkeypatch.setattr("jaxgpt_export.quantize.quantizer.round_in_order", rounding)
    monkeypatch.setattr("jaxgpt_export.quantize.quantizer.measure_quality", measuring)
    quantizer = Quantizer(read_artifact(tmp_path), dataclasses.replace(open_dataset(data), train=train))
    find_method("int4-weight-only").apply(quantizer)
    find_method("int8-weight-only").apply(quantizer)
    assert all(len(tokens) > 600 for tokens in seen.values())
    assert not (seen["calibration"] | seen["gptq"]) & seen["choice"]


@pytest.mark.parametrize("count", [3, 80, 1000])
def test_windows_of_the_other_shift_overlap_none(count: int) -> None:
    tokens = np.arange(4000, dtype=np.uint16)
    first, second = (spread_windows(tokens, 24, count, shift) for shift in (0, 1))
    assert first.shape == second.shape == (min(count, 4000 // 48), 24)
    for windows in (first, second):
        assert torch.equal(windows, windows[:, :1] + torch.arange(24, dtype=torch.int32)[None])
        assert len(windows.unique()) == windows.numel()
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_a_head_of_4_bits_is_not_among_the_layers_to_keep(quantizer: Quantizer) -> None:
    method = find_method("int4-weight-only-head")
    made = method.apply(quantizer)
    rows = sensitivity(quantizer, made)
    assert ("wte", 4) in {(row["layer"], row["bits"]) for row in rows}
    worst = worst_layers(quantizer, method, made, len(rows))
    assert worst == [row["layer"] for row in rows if row["layer"] != "wte"]


def test_a_kept_layer_is_float_or_has_8_bits(quantizer: Quantizer) -> None:
    method, config = find_method("int8-dynamic"), quantizer.config
    made = method.apply(quantizer, ["h.0.attn.c_proj", "wte"])
    assert high_precision_layers(config, method, made) == ["wte", "h.0.attn.c_proj"]
    assert made.tensors["wte.weight"].dtype == torch.float32
    method = find_method("int4-weight-only")
    made = method.apply(quantizer, ["h.0.attn.c_proj"])
    assert high_precision_layers(config, method, made) == ["h.0.attn.c_proj"]
    assert made.tensors["h.0.attn.c_proj.weight"].dtype == torch.int8
    with pytest.raises(UserError, match="to keep it: int4-weight-only"):
        find_method("int4-weight-only-head").apply(quantizer, ["wte"])
    with pytest.raises(UserError, match=r"no layer h\.7"):
        find_method("int8-dynamic").apply(quantizer, ["h.7"])


def test_kept_layers_are_written_and_verified(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    arguments = (
        "--artifact",
        fp32,
        "--method",
        "int8-dynamic",
        "--data",
        data,
        "--high-precision-layers",
        2,
        "--sensitivity",
    )
    code, out, _ = command("jaxgpt-export", "quantize", *arguments, "--out", tmp_path / "a", "--json")
    assert code == 0
    figures = last_json(out)
    assert len(figures["kept"]) == 2
    assert figures["speed_against_float"] > 0
    assert figures["speed_engine"] == ("native" if instruction_sets() else "torch")
    assert len(figures["sensitivity"]) == 2 + 2 * 4 - 2
    assert command("jaxgpt-export", "verify", "--artifact", tmp_path / "a")[0] == 0
    schemes = read_artifact(tmp_path / "a").quantization.layers
    linear = linear_layers(read_artifact(tmp_path / "a").config)
    float32 = {name for name, scheme in schemes.items() if scheme.weight_bits == 32}
    assert {linear[name].matrix if name in linear else name for name in float32} == set(figures["kept"])


def test_auto_writes_what_it_chose_or_nothing(
    command: Command, fp32: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--artifact", fp32, "--method", "auto", "--data", data, "--out", tmp_path / "a", "--json")
    code, out, err = command("jaxgpt-export", "quantize", *arguments, "--max-loss", 1)
    assert code == 0
    assert last_json(out)["kind"] == read_artifact(tmp_path / "a").kind == "int4-weight-only-head"
    assert "speed / float" in err
    monkeypatch.setattr(
        "jaxgpt_export.quantize.auto.cheapest_first", lambda quantizer: [find_method("int4-weight-only")]
    )
    # A rounded model may be better than float by chance: its figures say that it is worse.
    monkeypatch.setattr(
        "jaxgpt_export.quantize.auto.table_row", lambda *found: {**table_row(*found), "loss_increase": 1.0}
    )
    arguments = (*arguments[:6], "--out", tmp_path / "b", "--json")
    code, out, err = command("jaxgpt-export", "quantize", *arguments, "--max-loss", 0)
    assert code == 1
    assert "no artifact was written" in err
    assert not (tmp_path / "b").exists()
    assert len(last_json(out)["tried"]) == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--method", "auto"), "--data"),
        (("--method", "int8-dynamic", "--keep", -1), "--high-precision-layers (-1)"),
        (("--method", "int8-static-qat"), "no trained input scales"),
        (("--method", "int8-dynamic", "--high-precision-layers", 1), "--data"),
    ],
)
def test_what_can_not_be_done_is_one_line(
    command: Command, fp32: Path, tmp_path: Path, extra: tuple[object, ...], words: str
) -> None:
    arguments = ("--artifact", fp32, *extra, "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), words)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--max-loss", "inf"), "--max-loss (inf)"),
        (("--max-loss", "nan"), "--max-loss (nan)"),
        (("--max-loss", 0.001), "--max-loss is what --method auto chooses by"),
        (("--high-precision-layers", 1000), "nothing to round"),
    ],
)
def test_bounds_that_mean_nothing_are_one_line(
    command: Command, fp32: Path, data: Path, tmp_path: Path, extra: tuple[object, ...], words: str
) -> None:
    arguments = ("--artifact", fp32, "--method", "int8-dynamic", "--data", data, "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments, *extra), words)
    assert not (tmp_path / "a").exists()


def test_sensitivity_without_text_leaves_no_artifact(command: Command, fp32: Path, tmp_path: Path) -> None:
    arguments = ("--artifact", fp32, "--method", "int8-dynamic", "--sensitivity", "--out", tmp_path / "a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "--sensitivity", "--data")
    assert not (tmp_path / "a").exists()


def test_speed_is_that_of_what_runs(quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine for both, or the module for both: never one beside the other."""
    candidate = find_method("int8-weight-only").apply(quantizer)
    model = candidate.model(quantizer.config)
    used: list[str] = []

    def counted(kind: type[NativeSession] | type[TorchSession]) -> Callable[..., object]:
        plain = kind.decode

        def decode(self: Any, token: int) -> object:
            used.append(kind.__name__)
            return plain(self, token)

        return decode

    for kind in (NativeSession, TorchSession):
        monkeypatch.setattr(kind, "decode", counted(kind))
    if instruction_sets():
        assert measure_speed(quantizer, candidate, model)[1:] == ("native", None)
        assert set(used) == {"NativeSession"}
    used.clear()
    monkeypatch.setattr(speed_module, "unsupported_reason", lambda artifact: "it was not built")
    found = measure_speed(quantizer, candidate, model)
    assert found[1:] == ("torch", "it was not built")
    assert found.against_float > 0
    assert set(used) == {"TorchSession"}
