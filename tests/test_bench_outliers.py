import json
from pathlib import Path

import torch
from conftest import Command, assert_one_line_error
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


def test_outliers_takes_a_float_artifact_of_the_data(
    command: Command, int8_dynamic: Path, data: Path
) -> None:
    arguments = ("--artifact", int8_dynamic, "--data", data)
    assert_one_line_error(command("jaxgpt-bench", "outliers", *arguments), "int8-dynamic", "float32")
