import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.quality import outlier_channels
from jaxgpt_bench.quality.outlier_channels import with_outliers
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.model.build import float_model

from jaxgpt.shared.config import ModelConfig

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=2, n_head=4, n_embd=32)


def test_channels_get_a_hundred_times_larger_and_the_function_stays() -> None:
    tensors = random_tensors(CONFIG)
    changed = with_outliers(CONFIG, tensors, seed=0)
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = float_model(CONFIG, tensors)(tokens), float_model(CONFIG, changed)(tokens)
    # float32; every weight was multiplied and divided once
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    for norm in ("h.0.ln_1", "h.1.ln_2"):
        ratio = changed[f"{norm}.weight"] / tensors[f"{norm}.weight"]
        assert float(ratio.max()) == 100
        assert int((ratio != 1).sum()) == 1  # one in a hundred, and at least one
    values = changed["h.0.attn.c_attn.weight"][64:] / with_outliers_read(tensors, changed)
    assert float(values.max()) > 90


def with_outliers_read(tensors: dict[str, torch.Tensor], changed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value rows with what their columns read undone."""
    gain = changed["h.0.ln_1.weight"] / tensors["h.0.ln_1.weight"]
    return tensors["h.0.attn.c_attn.weight"][64:] / gain


def test_outliers_says_who_stands_it(command: Command, fp32: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("--artifact", fp32, "--data", data, "--tokens", 1000, "--out", tmp_path / "o.json")
    code, _, err = command("jaxgpt-bench", "outliers", *arguments)
    figures = json.loads((tmp_path / "o.json").read_text())
    assert code == (0 if all(figures["gates"].values()) else 1)
    assert abs(figures["float_loss"] - figures["float_loss_with_outliers"]) < 1e-5
    rows = {row["method"]: row for row in figures["rows"]}
    assert set(rows) == {"dynamic", "static", "naive"}
    assert rows["naive"]["kl_mean"] > 20 * rows["static"]["kl_mean"]
    assert rows["naive"]["kl_mean"] > 20 * rows["dynamic"]["kl_mean"]
    assert "naive static" in err


# What each gate is held to: nats that the float loss moves, and that a method loses with outliers.
PLAIN = {"float": 0.0, "dynamic": 0.01, "static": 0.0001, "naive": 0.01}
INSIDE = {"float": 0.99e-4, "dynamic": 0.0199, "static": 0.0019, "naive": 0.0201}


def measured_figures(losses: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What `measured` returns, the float model's loss 1 and so much more."""
    shared = {"tokens": 9, "kl_mean": 0.0, "observer": None}
    return {
        name: {"loss": 1 + loss, "loss_increase": 0.0 if name == "float" else loss, **shared}
        for name, loss in losses.items()
    }


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"float": -0.99e-4},
        {"float": 1.01e-4},
        {"float": -1.01e-4},
        {"dynamic": 0.0201},  # twice what it loses without outliers is allowed
        {"static": 0.0021},  # 0.002 is, where that is more
        {"naive": 0.0199},  # it is to fail
    ],
    ids=str,
)
def test_outliers_gates_are_held_to_their_bounds(
    changed: dict[str, float], command: Command, fp32: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([measured_figures(PLAIN), measured_figures(INSIDE | changed)])
    monkeypatch.setattr(outlier_channels, "measured", lambda *_: next(found))
    code, out, _ = command("jaxgpt-bench", "outliers", "--artifact", fp32, "--data", data, "--json")
    failed = changed.keys() if changed != {"float": -0.99e-4} else ()
    gates = json.loads(out)["gates"]
    assert list(gates.values()) == [name not in failed for name in INSIDE]
    assert code == (1 if failed else 0)


def test_outliers_takes_a_float_artifact_of_the_data(
    command: Command, int8_dynamic: Path, data: Path
) -> None:
    arguments = ("--artifact", int8_dynamic, "--data", data)
    assert_one_line_error(command("jaxgpt-bench", "outliers", *arguments), "int8-dynamic", "float32")
