"""`jaxgpt-bench quality`: windows, errors, parents, held-out programs, and other programs' rows."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.rows import ParseCount, QualityFigures, QualityRow, WrittenText
from jaxgpt_bench.common.tables import computed_by
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.quality.contestants import ComparedModel, ComparedModels, parent_name
from jaxgpt_bench.quality.measure import (
    SPREAD,
    WHOLE,
    markdown_block,
    measure_quality_of,
    quality_row,
    which_windows,
    xz_bits_per_byte,
)
from jaxgpt_bench.quality.samples import (
    Prompt,
    held_out_texts,
    parse_count,
    sample_prompts,
    spread_evenly,
)
from jaxgpt_bench.sandbox.programs import parses
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.scheme import Quantization
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.parity.quality import Quality, difference_error, measure_quality

from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import load_tokenizer


def test_xz_and_parse_share_are_what_they_say() -> None:
    assert parses("def f():\n    return 1\n")
    assert not parses("def f(:")
    assert not parses("   \n")
    assert xz_bits_per_byte(b"ab" * 5000) < 0.2
    noise = bytes(torch.randint(32, 127, (20_000,), generator=torch.Generator().manual_seed(0)).tolist())
    assert 6.5 < xz_bits_per_byte(noise) < 7.2  # log2(95) = 6.57


def test_prompts_end_where_the_code_begins(data: Path) -> None:
    tokenizer = load_tokenizer(data)
    texts = ["Say a ```python\nx = 1\n```", "no code at all " * 40, "long " * 100 + "```python\n"]
    first, second = sample_prompts(texts, tokenizer, 5, 60)
    assert first == Prompt("Say a ```python\n", "x = 1\n")
    assert second.text + second.rest == texts[1]
    assert len(tokenizer.encode(second.text)) == 30
    assert sample_prompts(texts[::-1], tokenizer, 1, 60) == [first]  # of a fenced document, as there is one
    assert sample_prompts(texts[1:], tokenizer, 1, 60) == [second]


def test_held_out_code_is_cut_and_parsed_as_samples_are(data: Path) -> None:
    tokenizer = load_tokenizer(data)
    prompts = [
        Prompt("a ```python\n", "x = 1\n"),
        Prompt("b ```python\n", "y = (1 + 2 + 3 + 4 + 5 + 6)\n" * 9),
    ]
    whole, cut = held_out_texts(prompts, tokenizer, 12)
    assert whole == WrittenText(text="x = 1\n", finish_reason="stop", parses=True)
    assert cut.finish_reason == "length"
    assert prompts[1].rest.startswith(cut.text)
    assert len(tokenizer.encode(cut.text)) == 12
    assert not cut.parses
    assert parse_count([whole, cut]) == ParseCount(texts=2, parse=1, cut=1)


def test_windows_are_spread_over_the_whole_split_and_the_differences_have_paired_errors(
    command: Command, fp32: Path, int8_static: Path, data: Path, tmp_path: Path
) -> None:
    assert spread_evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert spread_evenly(3, 9).tolist() == [0, 1, 2]
    block_size = read_artifact(fp32).config.block_size
    page = tmp_path / "page.md"
    page.write_text("before <!-- quality: begin -->\nolder\n<!-- quality: end --> after\n")
    call = ("quality", "--artifact", fp32, int8_static, "--data", data, "--samples", 0, "--table", page)
    code, _, said = command(
        "jaxgpt-bench", *call, "--tokens", 3 * block_size, "--out", tmp_path / "quality.json"
    )
    assert code == 0, said
    figures = json.loads((tmp_path / "quality.json").read_text())
    inputs, targets = windows(open_dataset(data).val, block_size)
    middle = round((len(inputs) - 1) / 2)
    losses = []
    for folder in (fp32, int8_static):
        model = build_model(read_artifact(folder))
        each = []
        for window in (0, middle, -1):
            counted = torch.from_numpy(targets[window]).long()
            logits = model(torch.from_numpy(inputs[window])[None].long())[0].double()
            each.append(torch.nn.functional.cross_entropy(logits, counted, ignore_index=-1, reduction="sum"))
        losses.append(torch.stack(each).detach().numpy())
    counts = (targets[[0, middle, -1]] >= 0).sum(axis=1)
    first, second = figures["rows"]
    assert figures["val_tokens"] == counts.sum()
    assert first["val_loss"] == pytest.approx(losses[0].sum() / counts.sum(), rel=1e-6)
    assert first["difference_error"] is None
    paired = losses[1] - losses[0]
    assert second["loss_increase"] == pytest.approx(paired.sum() / counts.sum(), abs=1e-8)
    spread = paired - second["loss_increase"] * counts
    expected = math.sqrt(3 / 2 * (spread**2).sum()) / counts.sum()
    assert second["difference_error"] == pytest.approx(expected, rel=1e-3)
    table = markdown_block(QualityFigures.from_json(figures))
    assert page.read_text() == f"before <!-- quality: begin -->\n{table}\n<!-- quality: end --> after\n"
    page.write_text("<!-- quality: begin -->")
    assert_one_line_error(command("jaxgpt-bench", *call), "page.md has no <!-- quality: begin --> ...")
    assert "held-out tokens, spread evenly over the validation split" in table
    assert f"{second['loss_increase']:+.5f} ± {second['difference_error']:.5f}" in table


def test_the_error_of_a_difference_is_the_standard_error_over_windows() -> None:
    def measured(losses: tuple[float, ...], tokens: tuple[int, ...]) -> Quality:
        return Quality(sum(losses) / max(sum(tokens), 1), sum(tokens), None, None, losses, tokens)

    reference = measured((300.0, 100.0, 200.0, 0.0), (100, 100, 100, 0))  # the last is padding
    model = measured((301.0, 102.0, 206.0, 0.0), (100, 100, 100, 0))
    assert difference_error(model, reference) == pytest.approx(statistics.stdev([1, 2, 6]) / 100 / 3**0.5)
    assert difference_error(measured((5.0,), (9,)), measured((4.0,), (9,))) is None


def test_a_model_is_also_compared_with_its_own_parent(data: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(5, 5, generator=draw) for name in ("first", "parent", "child")}
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    parts = [(tokens, torch.tensor([[1, 2, 3], [4, 0, -1]]))]
    models = {name: table.__getitem__ for name, table in tables.items()}
    found = measure_quality(models, parts, {"child": "parent"})
    alone = measure_quality({name: models[name] for name in ("parent", "child")}, parts)
    assert found["child"].parent == alone["child"].parity
    assert found["child"].parity != found["child"].parent
    assert found["parent"].parent is None


def test_int8_static_qat_is_refused_beside_another_training_s_parent(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = dataclasses.replace(read_artifact(fp32), trained={"logits": np.ones(1, np.float32)})
    child = dataclasses.replace(parent, quantization=Quantization("int8-static-qat", {}))
    assert child.kind == "int8-static-qat"
    origin = {"parent_sha256": sha256_of(fp32 / "model.safetensors")}
    monkeypatch.setattr(
        "jaxgpt_bench.quality.contestants.read_certificate", lambda folder: {"origin": origin}
    )
    assert parent_name(child, [parent, child]) == "fp32-qat"
    assert parent_name(child, [child]) is None
    assert parent_name(parent, [parent, child]) is None
    origin["parent_sha256"] = "0"
    with pytest.raises(UserError, match="give what belongs together"):
        parent_name(child, [parent, child])


def test_settings_that_a_program_chose_stand_in_its_row() -> None:
    measured = {"peer int8": Quality(1.0, 4, None, None, (4.0,), (4,))}
    for settings in ({"spin": "1"}, None):
        model = ComparedModel("peer int8", lambda tokens: tokens, None, 1.0, settings=settings)
        row = quality_row(model, measured, 8, []).to_json()
        assert row.get("settings") == settings
        assert ("settings" in row) == (settings is not None)


def test_a_program_that_stops_is_noted_and_costs_no_other_its_row(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset, tokenizer = open_dataset(data), load_tokenizer(data)
    table = torch.randn(
        tokenizer.vocab_size, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0)
    )

    def stops(tokens: torch.Tensor) -> torch.Tensor:
        raise UserError("peer stopped with code 1")

    forwards = {"first": table.__getitem__, "peer": stops, "last": table.__getitem__}
    models = [ComparedModel(name, forward, None, 1.0) for name, forward in forwards.items()]
    asked = ComparedModels(models, tokenizer, 16), dataset, 64, 0, 4
    figures = measure_quality_of(*asked, {"other": "not installed"})
    assert [row.name for row in figures.rows] == ["first", "last"]
    assert figures.left_out == {"other": "not installed", "peer": "peer stopped with code 1"}
    assert "peer is left out: peer stopped with code 1" in capfd.readouterr().err
    with pytest.raises(UserError, match="code 1"):
        measure_quality_of(*asked)  # no program was asked for: all models are


def test_the_program_that_computed_a_row_stands_in_it() -> None:
    measured = {"int8": Quality(1.0, 4, None, None, (4.0,), (4,))}
    model = ComparedModel("int8", lambda tokens: tokens, None, 1.0, engine="jaxgpt-native")
    row = quality_row(model, measured, 8, [])
    assert QualityRow.from_json(row.to_json()).engine == "jaxgpt-native"
    old = dataclasses.replace(row, name="old", engine=None)
    assert "engine" not in old.to_json()
    assert computed_by([row, old, dataclasses.replace(row, name="int4")]) == "jaxgpt-native: int8, int4"
    assert computed_by([old]) == ""
    assert which_windows(3, 4) == SPREAD
    assert which_windows(4, 4) == WHOLE


def test_quality_of_programs_stands_beside_the_artifacts_and_what_is_missing_is_said(
    command: Command,
    fp32: Path,
    int8_static: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(find_peers()["openvino"], "missing", lambda: ["openvino"])
    call = ("quality", "--artifact", fp32, int8_static, "--data", data, "--samples", 2, "--sample-tokens", 4)
    code, _, said = command(
        "jaxgpt-bench", *call, "--tokens", 99, "--peers", "openvino", "--out", tmp_path / "q.json"
    )
    assert code == 0, said
    assert "openvino is left out: openvino not installed" in said
    figures = json.loads((tmp_path / "q.json").read_text())
    assert figures["left_out"] == {"openvino": "openvino not installed (pip install openvino)"}
    rows = {row["name"]: row for row in figures["rows"]}
    program, floats = (rows.pop(f"jaxgpt-native {kind}", None) for kind in ("int8-static", "fp32"))
    assert list(rows) == ["torch-fp32", "int8-static"]
    assert list(figures["samples"]) == list(rows)  # programs write none
    if instruction_sets():  # the same integers; the float16 cache makes a small difference
        assert program is not None
        assert floats is not None
        assert floats["kl_max"] < 1e-8
        assert program["parse_share"] is None
        assert "settings" not in program
        assert program["kl_mean"] == pytest.approx(rows["int8-static"]["kl_mean"], rel=0.2)
        assert program["kl_mean"] != rows["int8-static"]["kl_mean"]
        assert program["kl_mean"] <= program["kl_p999"] <= program["kl_max"]
    found = QualityFigures.from_json(figures)
    assert json.loads(json.dumps(found.to_json())) == figures
    assert "| KL 99.9 % |" in markdown_block(found)
    older = dataclasses.replace(found, rows=tuple(without_errors(row) for row in found.rows))
    assert "| KL mean | KL max | top-1 |" in markdown_block(older)


def without_errors(row: QualityRow) -> QualityRow:
    """A row as earlier versions wrote it."""
    return dataclasses.replace(
        row, kl_mean_error=None, kl_p999=None, rms_probability_change=None, top1_error=None
    )
