"""`jaxgpt-bench quality`, `generate` and `report`: what their files, tables and page hold."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.bandwidth import read_bandwidth
from jaxgpt_bench.common.markdown_blocks import write_between_markers
from jaxgpt_bench.common.rows import QualityFigures
from jaxgpt_bench.peers import find_peers
from jaxgpt_bench.peers.peer import Program, Variant
from jaxgpt_bench.quality.measure import markdown_block
from jaxgpt_bench.sandbox.programs import parses
from jaxgpt_bench.speed.contestants import Contestant, weight_bytes, with_cache
from jaxgpt_bench.speed.programs import NATIVE, TORCH
from jaxgpt_bench.speed.random_models import placeholder_tokenizer
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.native.library import instruction_sets

from jaxgpt.shared.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# Five times what was measured, 1.8e-6: another processor trains another model, which rounding costs about as
# much.
MAX_KL = 1e-5
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
    assert 0 < rows["int8-dynamic"]["kl_mean"] <= MAX_KL
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
    rows = [[each["read_gb_s"] for each in row["by_round"]] for row in figures["rows"]]
    first, *others = (
        (max(each) - min(each)) / statistics.median(each) for each in (figures["bandwidth_gb_s"], *rows)
    )
    apart = max(first, statistics.median(others))
    assert figures["noise"]["probe_spread"] == pytest.approx(apart, abs=0.01)  # the former are rounded
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
        (peers["transformers"], "fp32", False, 0), (peers["torchao"], "int8-weight-only", True, 2),
        (peers["torchao"], "int8-dynamic", True, 4),
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


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 0.5 < read_bandwidth(10_000_000, 1) < 10_000


def test_placeholder_tokenizer_has_its_size() -> None:
    assert placeholder_tokenizer(50257).vocab_size == 50257


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
