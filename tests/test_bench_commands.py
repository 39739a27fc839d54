import dataclasses
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.markdown_blocks import write_between_markers
from jaxgpt_bench.common.rows import ParseCount, QualityFigures, QualityRow, WrittenText
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import Program, Variant
from jaxgpt_bench.quality.contestants import parent_name
from jaxgpt_bench.quality.measure import markdown_block, xz_bits_per_byte
from jaxgpt_bench.quality.samples import (
    Prompt,
    held_out_texts,
    parse_count,
    sample_prompts,
    spread_evenly,
)
from jaxgpt_bench.sandbox.programs import parses
from jaxgpt_bench.speed.contestants import Contestant, weight_bytes, with_cache
from jaxgpt_bench.speed.programs import NATIVE, TORCH
from jaxgpt_bench.speed.random_models import placeholder_tokenizer
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.scheme import Quantization
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.parity.quality import Quality, difference_error, measure_quality

from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["flax-fp32", "torch-fp32", "int8-dynamic", "int8-static"]


@pytest.fixture(scope="module")
def artifacts(fp32: Path, int8_dynamic: Path, int8_static: Path) -> tuple[Path, ...]:
    return (fp32, int8_dynamic, int8_static)


@pytest.fixture(scope="module")
def quality(work: Path, run: Path, data: Path, artifacts: tuple[Path, ...]) -> Path:
    from conftest import run_command

    arguments = (
        "--run",
        run,
        "--artifact",
        *artifacts,
        "--data",
        data,
        "--samples",
        3,
        "--sample-tokens",
        30,
    )
    assert run_command("jaxgpt-bench", "quality", *arguments, "--out", work / "quality.json") == 0
    return work / "quality.json"


@pytest.fixture(scope="module")
def speed(work: Path, run: Path, artifacts: tuple[Path, ...]) -> Path:
    from conftest import run_command

    arguments = (
        "--run",
        run,
        "--artifact",
        *artifacts,
        "--tokens",
        20,
        "--rounds",
        2,
        "--uncached",
        "--threads",
        1,
        *(("--isa", "portable") if instruction_sets() else ()),
    )
    assert (
        run_command(
            "jaxgpt-bench", "generate", *arguments, "--peer", "transformers", "--out", work / "speed.json"
        )
        == 0
    )
    return work / "speed.json"


def test_quality_table_measures_every_model_on_the_whole_split(quality: Path, run: Path, data: Path) -> None:
    figures = json.loads(quality.read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == NAMES
    summary = json.loads((run / "summary.json").read_text())
    # Another path to the same number: the trainer's own validation.
    assert abs(rows["flax-fp32"]["val_loss"] - summary["val_loss"]) < 1e-5
    assert abs(rows["flax-fp32"]["val_bits_per_byte"] - summary["val_bits_per_byte"]) < 1e-5
    assert rows["torch-fp32"]["max_abs_logit_diff"] <= 1e-4
    assert abs(rows["torch-fp32"]["loss_increase"]) < 1e-6
    assert 0 < rows["int8-dynamic"]["kl_mean"] < 1e-3
    assert rows["int8-dynamic"]["size_mb"] < rows["torch-fp32"]["size_mb"]
    assert all(0.9 < row["top1_agreement"] <= 1.0 for row in rows.values())
    assert set(figures["machine"]) >= {"cpu", "cores", "packages"}


def test_samples_of_equal_models_are_equal(quality: Path) -> None:
    samples = json.loads(quality.read_text())["samples"]
    assert list(samples) == NAMES
    assert [s["text"] for s in samples["flax-fp32"]] == [s["text"] for s in samples["torch-fp32"]]
    assert all(sample["parses"] == parses(sample["text"]) for rows in samples.values() for sample in rows)


def test_generate_rows_hold_what_the_format_promises(speed: Path, artifacts: tuple[Path, ...]) -> None:
    figures = json.loads(speed.read_text())
    assert set(figures) >= {"machine", "settings", "rounds", "bandwidth_gb_s", "rows"}
    assert len(figures["bandwidth_gb_s"]) == figures["rounds"] == 2
    bandwidths = figures["bandwidth_gb_s"]
    apart = (max(bandwidths) - min(bandwidths)) / statistics.median(bandwidths)
    assert figures["noise"]["probe_spread"] == pytest.approx(apart, abs=0.01)
    assert 0 <= figures["noise"]["others_cpu_share"] <= 1
    keys = ("engine", "precision", "cached", "every_logit", "isa")
    names = {tuple(row[key] for key in keys) for row in figures["rows"]}
    kinds = ("fp32", "int8-dynamic", "int8-static")
    expected = {("jaxgpt-torch", kind, cached, False, "") for kind in kinds for cached in (True, False)}
    expected |= {
        ("transformers", "fp32", True, False, ""),
        ("transformers", "fp32", False, False, ""),
        ("transformers", "fp32", False, True, ""),
        ("jaxgpt-flax", "fp32", True, False, ""),
        *(
            ("jaxgpt-native", kind, True, False, isa)
            for kind in kinds
            for isa in ("", "portable")
            if instruction_sets()
        ),
    }
    assert names == expected
    for row in figures["rows"]:
        decode = row["decode_tokens_per_s"]
        assert 0 < decode["min"] <= decode["median"] <= decode["max"]
        ceiling = row["read_gb_s"] * 1e9 / row["bytes_per_token"]
        assert row["ceiling_tokens_per_s"] == pytest.approx(ceiling)
        assert 0 < row["ceiling_share"] < 2
        assert len(row["by_round"]) == 2
        assert row["characters_per_s"]["min"] > 0
        # The native engine needs no PyTorch, so there it is Python, numpy and a model of 0.2 MB.
        assert row["peak_rss_mb"] > (25 if row["engine"] == "jaxgpt-native" else 50)
        assert len(row["greedy_tokens"]) == 20


def test_float_engines_generate_the_same_greedy_tokens(speed: Path) -> None:
    rows = json.loads(speed.read_text())["rows"]
    texts = {tuple(row["greedy_tokens"]) for row in rows if row["precision"] == "fp32"}
    assert len(texts) == 1


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_native_measures_every_way_to_generate_the_same_tokens(
    fp32: Path, int8_dynamic: Path, data: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "native.json"
    models = ("--artifact", int8_dynamic, "--reference", fp32, "--data", data)
    more = ("--prompts", 2, "--tokens", 40, "--batch", 2, "--rounds", 2, "--threads", 1, "--out", out)
    assert command("jaxgpt-bench", "native", *models, *more)[0] == 0
    figures = json.loads(out.read_text())
    assert {"machine", "date", "commit", "command"} <= figures.keys()
    assert all(figures[way]["same_tokens"] for way in ("screen", "guess", "batch"))
    assert all(rate["min"] > 0 for rate in figures["tokens_per_s"].values())
    assert figures["original_way"]["plain_times_it"] > 1
    load, parity = figures["load"], figures["parity"]
    assert 0 < load["first_mb"] <= load["grown_mb"] <= load["peak_mb"]
    assert parity["fp32"]["max"] < parity["quantization_error_max"]
    wrong = ("--artifact", int8_dynamic, "--reference", int8_dynamic, "--data", data)
    assert_one_line_error(command("jaxgpt-bench", "native", *wrong), "is not the float32 artifact")
    other = shutil.copytree(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    changed = {**manifest, "tokenizer": {**manifest["tokenizer"], "sha256": "0" * 64}}
    (other / "manifest.json").write_text(json.dumps(changed))
    wrong = (*models[:-1], other)
    assert_one_line_error(command("jaxgpt-bench", "native", *wrong), "was made with another tokenizer")


def test_bytes_a_token_are_the_weights_it_touches(fp32: Path, int8_dynamic: Path) -> None:
    c = read_artifact(fp32).config
    per_block = 12 * c.n_embd**2 + 13 * c.n_embd
    parameters = c.vocab_size * c.n_embd + c.n_layer * per_block + 2 * c.n_embd
    assert weight_bytes(read_artifact(fp32)) == 4 * parameters
    matrices = c.vocab_size * c.n_embd + c.n_layer * 12 * c.n_embd**2
    scales = c.vocab_size + c.n_layer * 9 * c.n_embd
    artifact = read_artifact(int8_dynamic)
    vectors = sum(
        4 * c.n_embd
        for name, scheme in artifact.quantization.layers.items()
        if scheme.smoothing and name.endswith("mlp.c_proj")
    )
    floats = c.n_layer * 13 * c.n_embd + 2 * c.n_embd + scales + vectors
    assert weight_bytes(artifact) == matrices + 4 * floats


def test_keys_and_values_are_charged_to_every_engine_that_keeps_them(fp32: Path) -> None:
    config = read_artifact(fp32).config
    numbers = config.n_layer * 2 * config.n_embd * 10  # of the keys and values of ten positions
    peers = find_peers()
    cases: list[tuple[Program, str, bool, int]] = [
        (NATIVE, "int8-dynamic", True, 2), (NATIVE, "fp32", True, 4), (peers["llama.cpp"], "fp32", True, 2),
        (TORCH, "fp32", True, 4), (peers["openvino"], "fp32", True, 4),
        (peers["transformers"], "fp32", False, 0),
    ]  # fmt: skip
    for program, precision, cached, width in cases:
        contestant = Contestant(
            program=program, precision=precision, path=fp32, threads=1, variant=Variant(cached=cached),
            bytes_per_token=1000, file_bytes=2000,
        )  # fmt: skip
        assert with_cache(contestant, config, 10.0).bytes_per_token == 1000 + width * numbers


def test_weight_only_layers_are_read_in_float32(fp32: Path, int4: Path) -> None:
    assert weight_bytes(read_artifact(int4)) == weight_bytes(read_artifact(fp32))


def test_report_is_one_page_with_every_figure_from_its_files(
    command: Command, quality: Path, speed: Path, run: Path, fp32: Path, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    arguments = (
        "--run",
        run,
        "--fp32",
        fp32,
        "--quality",
        quality,
        "--speed",
        speed,
        speed,
        "--readme",
        readme,
    )
    figures = json.loads(speed.read_text())
    busy = {**figures, "noise": {**figures["noise"], "others_cpu_share": 0.38, "accepted": False}}
    speed.write_text(json.dumps(busy))
    code, _, said = command("jaxgpt-bench", "report", *arguments, "--out", tmp_path)
    assert code == 2
    assert "other processes used 38% of the cores" in said.splitlines()[-1]
    assert "old" in readme.read_text()
    assert json.loads((tmp_path / "report.json").read_text())["speed"][0]["noise"] == busy["noise"]
    assert command("jaxgpt-bench", "report", *arguments, "--accept-noise", "--out", tmp_path)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["speed"][0]["noise"]["accepted"]
    assert (
        report["train"]["val_bits_per_byte"]
        == json.loads((run / "summary.json").read_text())["val_bits_per_byte"]
    )
    assert report["train"]["cpu_seconds"] > 0
    assert report["parity"]["max_abs_logit_diff"] <= 1e-4
    assert report["commit"]
    assert [model["name"] for model in report["models"]] == NAMES
    for model in report["models"]:
        assert {"val_loss", "size_mb", "tokens_per_s", "top1_agreement"} <= set(model)
        assert model["tokens_per_s"] > 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(
        r'(src|href)="(?!#)', page
    )  # nothing is fetched: no script, style sheet or picture outside
    assert "<script" not in page
    for model in report["models"]:
        assert f"{model['val_loss']:.4f}" in page
    before, after = report["models"][1:3]
    smaller, faster = before["size_mb"] / after["size_mb"], after["tokens_per_s"] / before["tokens_per_s"]
    said = f"int8-dynamic makes this model {smaller:.1f} times smaller and writes {faster:.1f} times as many"
    assert said in page
    assert page.index(said) < page.index("Preset")
    assert f"<b>{smaller:.1f} times smaller</b>" in page
    assert f"<b>{faster:.1f} times the speed</b>" in page
    assert str(run.parent) not in page
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert f"| int8-dynamic | {report['models'][2]['val_loss']:.4f} |" in text


def test_generated_text_can_not_inject_html(
    command: Command, quality: Path, speed: Path, run: Path, fp32: Path, tmp_path: Path
) -> None:
    figures = json.loads(quality.read_text())
    figures["samples"]["int8-dynamic"][0]["text"] = "<script>alert(1)</script>"
    (tmp_path / "q.json").write_text(json.dumps(figures))
    arguments = ("--run", run, "--fp32", fp32, "--quality", tmp_path / "q.json", "--speed", speed)
    assert command("jaxgpt-bench", "report", *arguments, "--out", tmp_path)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


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
    call = ("quality", "--artifact", fp32, int8_static, "--data", data, "--samples", 0)
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


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 0.5 < read_bandwidth(10_000_000, 1) < 10_000


def test_placeholder_tokenizer_has_its_size() -> None:
    assert placeholder_tokenizer(50257).vocab_size == 50257


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


def test_models_that_do_not_belong_together_are_one_line(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ("--artifact", fp32, fp32, "--data", data)
    assert_one_line_error(command("jaxgpt-bench", "quality", *arguments), "each of another kind")
    assert_one_line_error(
        command("jaxgpt-bench", "generate", "--artifact", fp32, "--tokens", 99), "--tokens 99"
    )
    assert_one_line_error(command("jaxgpt-bench", "generate"), "nothing to measure")
    kinds = ("generate", "--artifact", fp32, "--kind", "fp32", "int8-dynamc")
    assert_one_line_error(
        command("jaxgpt-bench", *kinds), "--kind 'int8-dynamc' is none of the artifacts' kinds"
    )
    assert_one_line_error(
        command("jaxgpt-bench", "generate", "--preset", "gtp2"), "'gtp2'", "did you mean gpt2"
    )


def test_the_results_page_s_table_comes_from_committed_results() -> None:
    """Every row of the tables stands in a results file of the same name and figures."""
    text = (ROOT / "docs" / "results.md").read_text()
    table = text.partition("<!-- table: begin -->")[2].partition("<!-- table: end -->")[0]
    report = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    from jaxgpt_bench.report.page import ReportFigures, markdown_block

    assert table.strip() == markdown_block(ReportFigures.from_json(report)).strip()
    assert "| int8-dynamic |" in table


def test_the_quantization_table_comes_from_committed_results() -> None:
    text = (ROOT / "docs" / "quantization.md").read_text()
    table = text.partition("<!-- quality: begin -->")[2].partition("<!-- quality: end -->")[0]
    figures = json.loads((ROOT / "bench" / "results" / "reference_quality.json").read_text())
    assert table.strip() == markdown_block(QualityFigures.from_json(figures)).strip()
    assert {row["name"] for row in figures["rows"]} >= {"flax-fp32", "int8-static-qat", "int4-weight-only"}


def test_a_text_without_markers_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("no markers")
    with pytest.raises(UserError, match="quality: begin"):
        write_between_markers(path, "quality", "table")
    assert path.read_text() == "no markers"
    path.write_text("a\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nb\n")
    write_between_markers(path, "quality", "new")
    assert path.read_text() == "a\n<!-- quality: begin -->\nnew\n<!-- quality: end -->\nb\n"
