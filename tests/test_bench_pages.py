"""`jaxgpt-bench pages`: what the README and docs/ say in figures is what bench/results/ holds."""

import dataclasses
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.rows import QualityFigures, QualityRow, SpeedFigures
from jaxgpt_bench.pages import blocks, headline, quality_speed
from jaxgpt_bench.pages.blocks import BLOCKS, PICTURE, PICTURES, QUALITY_PICTURE, RESULTS, Block
from jaxgpt_bench.pages.headline import NAMES
from jaxgpt_bench.quality.measure import SPREAD
from jaxgpt_bench.report.page import ReportFigures, render
from jaxgpt_bench.reproduce.page.render import beginning, samples_block

from jaxgpt.shared.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAX_PICTURE_BYTES = 30_000


def results(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((ROOT / RESULTS / name).read_text())
    return found


def texts(svg: str) -> list[str]:
    """The words of a picture; where they stand may differ by the version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page} {block.marker}")
def test_every_block_comes_from_committed_results(block: Block) -> None:
    text = (ROOT / block.page).read_text(encoding="utf-8")
    found = text.partition(f"<!-- {block.marker}: begin -->")[2].partition(f"<!-- {block.marker}: end -->")[0]
    assert found.strip() == block.content(ROOT / RESULTS).strip()


@pytest.mark.parametrize("windows", ["", SPREAD])
def test_a_report_says_of_its_run_what_its_files_say_and_no_more(windows: str) -> None:
    figures = ReportFigures.from_json(results("demo.json"))
    quality = dataclasses.replace(
        QualityFigures.from_json(results("reference_quality.json")), windows=windows
    )
    speed = SpeedFigures.from_json(results("generate_gpt2.json"))
    data = {"tokenizer": {"name": "bpe:384"}, "folder": "data", "manifest_sha256": "ab" * 32}
    certificate = {
        "origin": {"data": data, "run": "run", "step": 2},
        "parity": {"max_abs_logit_diff": 1e-5},
        "files": {"model.safetensors": "cd" * 32},
    }
    metrics = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "val_loss": 4.5}]

    def page(rows: tuple[QualityRow, ...]) -> str:
        changed = dataclasses.replace(quality, rows=rows)
        return render(figures, changed, [speed], metrics, certificate)

    text = page(quality.rows)
    assert f"{quality.val_tokens:,} held-out tokens{', ' if windows else ''}{windows}; differences" in text
    assert not re.search(r"[Ww]hole validation split|trained for minutes|real GPUs|Logits by", text)
    assert f"The model has {figures.train['parameters']:,} parameters" in text
    first, *rest = quality.rows
    text = page((dataclasses.replace(first, engine="jaxgpt-flax"), *rest))
    assert f"Logits by jaxgpt-flax: {first.name}." in text


def test_no_page_has_a_block_that_the_command_does_not_write() -> None:
    pages = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    marked = {
        (str(page.relative_to(ROOT)), name)
        for page in pages
        for name in re.findall(r"(?m)^<!-- ([\w-]+): begin -->$", page.read_text(encoding="utf-8"))
    }
    assert marked == {(block.page, block.marker) for block in BLOCKS}


def test_the_picture_is_that_of_the_committed_results() -> None:
    committed = (ROOT / PICTURE).read_text(encoding="utf-8")
    drawn = blocks.picture(ROOT / RESULTS)
    assert texts(committed) == texts(drawn)
    if f"matplotlib=={version('matplotlib')}" in (ROOT / "constraints.txt").read_text().split():
        assert committed == drawn
    assert drawn == blocks.picture(ROOT / RESULTS)


def test_the_picture_fetches_nothing_and_is_small() -> None:
    committed = (ROOT / PICTURE).read_text(encoding="utf-8")
    assert len(committed.encode()) <= MAX_PICTURE_BYTES
    assert "<script" not in committed
    assert "<image" not in committed
    assert not re.search(r'href="(?!#)', committed)
    # No background: it stands on GitHub's white page as on its dark one.
    assert "#ffffff" not in committed


def test_the_picture_has_every_program_s_int8_first_and_this_project_s_engine_in_colour() -> None:
    figures = SpeedFigures.from_json(results(blocks.MACHINES[blocks.NEWEST]))
    words = texts((ROOT / PICTURE).read_text(encoding="utf-8"))
    programs = {row.engine for row in figures.rows if row.cached and row.precision.startswith("int8")}
    int8 = words[words.index("INT8") : words.index("float32")]
    assert sum("%" in word for word in int8) == len(programs)
    float32 = words[words.index("float32") :]
    rows = [row for row in figures.rows if row.precision == "fp32" and row.cached]
    assert sum(word.endswith("%)") for word in float32) == len(rows)
    ours = next(row for row in figures.rows if row.name == "jaxgpt-native int8-dynamic")
    assert f"{ours.decode_tokens_per_s.median:.0f}  ({ours.ceiling_share:.0%})" in int8


def test_the_chart_of_speed_and_quality_has_every_program_of_its_files() -> None:
    """Points, computed here from the files alone; where another program is better, it stands there too."""
    speed = results("generate_gpt2_zen5.json")["rows"]
    assert isinstance(speed, list)
    quality = results(blocks.QUALITY)["rows"]
    assert isinstance(quality, list)
    rates = {
        f"{row['engine']} {row['precision']}": row["decode_tokens_per_s"]["median"]
        for row in speed
        if row["cached"] and not row.get("isa")
    }
    settings = {f"{row['engine']} {row['precision']}": row["settings"] for row in speed}
    alike = [
        row
        for row in quality
        if row["name"].partition(", ")[0] in rates
        and all(
            settings[row["name"].partition(", ")[0]].get(key) == value
            for key, value in (row.get("settings") or {}).items()
            if key in ("dynamic_quantization_group_size", "delegated")
        )
    ]
    expected = {
        (row["loss_increase"], row["difference_error"], rates[row["name"].partition(", ")[0]])
        for row in alike
    }
    figures = blocks._quality_and_speed(ROOT / RESULTS)
    points = quality_speed.points(*figures[:2])
    assert {(point.nats, point.error, point.rate) for point in points} == expected
    assert len(points) == len(expected) > 10
    words = texts((ROOT / QUALITY_PICTURE).read_text(encoding="utf-8"))
    assert points[0].program == "jaxgpt"
    assert {point.program for point in points} | {"8 bits", "4 bits"} <= set(words)
    assert "ExecuTorch" in words
    table = quality_speed.markdown_block(*figures)
    assert all(f"| {row['name']} | " in table for row in quality if " " in row["name"])
    measured, shown = ({row["name"].partition(", ")[0] for row in each} for each in (quality, alike))
    otherwise = rates.keys() & measured - shown
    assert all(f"{name} (dynamic_quantization_group_size" in table for name in otherwise)


def test_of_a_program_s_settings_the_chart_has_the_one_that_its_speed_was_measured_with() -> None:
    quality, speed, cpu = blocks._quality_and_speed(ROOT / RESULTS)
    name, key = "openvino int8-weight-only", "dynamic_quantization_group_size"
    row = next(each for each in quality.rows if each.name == name)
    costs = {0: 0.25, 32: 0.5}
    several = [
        dataclasses.replace(row, name=f"{name}, {key} {group}", settings={key: group}, loss_increase=nats)
        for group, nats in costs.items()
    ]
    measured = next(each for each in speed.rows if each.name == name)
    for group, nats in costs.items():
        rows = [dataclasses.replace(measured, settings={key: group})]
        floats = dataclasses.replace(
            row, name="executorch fp32, delegated all", settings={"delegated": "all"}
        )
        found = dataclasses.replace(quality, rows=(*quality.rows[:1], *several, floats))
        (point,) = quality_speed.points(found, dataclasses.replace(speed, rows=tuple(rows)))
        assert (point.nats, point.rate) == (nats, measured.decode_tokens_per_s.median)
        table = quality_speed.markdown_block(found, dataclasses.replace(speed, rows=tuple(rows)), cpu)
        assert "Not in the chart" not in table
        lines = {
            each: next(x for x in table.splitlines() if f"| {name}, {key} {each} |" in x) for each in costs
        }
        assert {each: line.endswith(" |  |") for each, line in lines.items()} == {
            each: each != group for each in costs
        }


def test_the_claim_names_the_fastest_other_program_of_each_machine() -> None:
    """Computed here from the files alone."""
    claim = blocks.claim(ROOT / RESULTS)
    for name in blocks.MACHINES.values():
        rows = SpeedFigures.from_json(results(name)).rows
        rates = {
            row.name: row.decode_tokens_per_s.median for row in rows if row.precision.startswith("int8-")
        }
        best = max(rate for row, rate in rates.items() if not row.startswith("jaxgpt"))
        assert f"{rates['jaxgpt-native int8-dynamic']:.0f}" in claim
        assert f" {best:.0f}" in claim
    assert "random weights" in claim


def test_ratios_are_those_of_the_files_with_every_other_program_in_them() -> None:
    """Computed here from the files alone: medians of the fastest 8 bits, prompts of the fastest 4 bits."""
    tables = blocks.speed_ratios(ROOT / RESULTS)
    for name in blocks.MACHINES.values():
        rows = results(name)["rows"]
        assert isinstance(rows, list)
        rates = {f"{row['engine']} {row['precision']}": row["decode_tokens_per_s"]["median"] for row in rows}
        ours, best = rates["jaxgpt-native int8-dynamic"], max(
            rate for row, rate in rates.items() if row.startswith("onnxruntime int8")
        )  # fmt: skip
        assert re.search(rf"\| ONNX Runtime, 8 bits \|.* {ours / best:.2f} \(", tables)
        rounds = {
            f"{row['engine']} {row['precision']}": [each["tokens_per_s"] for each in row.get("by_round", ())]
            for row in rows
        }
        if each_other := rounds.get("executorch int8-dynamic"):
            own = rounds["jaxgpt-native int8-dynamic"]
            found = sorted(one / other for one, other in zip(own, each_other, strict=True))
            assert f" ({found[0]:.2f}-{found[-1]:.2f}; " in tables
        for engine in {row["engine"] for row in rows if row["precision"].startswith("int8")}:
            shown = f"| {NAMES[engine]}, 8 bits |" in tables
            assert shown == (not engine.startswith("jaxgpt"))
    busy, expected = tables[tables.index("beside two busy") :], []
    for name in blocks.BUSY_MACHINES.values():
        rates = {
            row.name: row.busy_tokens_per_s.median
            for row in SpeedFigures.from_json(results(name)).rows
            if row.busy_tokens_per_s is not None
        }
        best = max(rate for row, rate in rates.items() if row.startswith("onnxruntime int8"))
        expected.append(f"{rates['jaxgpt-native int8-dynamic'] / best:.2f}")
    row = next(line for line in busy.splitlines() if line.startswith("| ONNX Runtime, 8 bits |"))
    assert row.split(" | ")[1:] == [*expected[:-1], f"{expected[-1]} |"]
    assert [line.split(":")[0] for line in tables.splitlines() if "times as fast" in line] == [
        "| generation", "| generation, had memory been read equally fast", "| prompts",
        "| generation beside two busy processes",
    ]  # fmt: skip


def test_a_program_that_was_not_measured_is_a_user_s_error() -> None:
    found = results("generate_gpt2.json")
    figures = SpeedFigures.from_json(found)
    rows = tuple(row for row in figures.rows if row.engine != "jaxgpt-native")
    from dataclasses import replace

    with pytest.raises(UserError, match="no row of jaxgpt-native"):
        headline.claim({"Intel Xeon": replace(figures, rows=rows)})
    whole = SpeedFigures.from_json(results(blocks.MACHINES[blocks.NEWEST]))
    alone = tuple(row for row in figures.rows if row.engine.startswith("jaxgpt"))
    with pytest.raises(UserError, match="no INT8 of another program"):
        headline.claim({"AMD Zen 5": whole, "Intel Xeon": replace(figures, rows=alone)})


def copy_of_pages(folder: Path) -> Path:
    """The pages with empty blocks, without the picture, and the results."""
    shutil.copytree(ROOT / RESULTS, folder / RESULTS)
    (folder / "docs").mkdir()
    for name in {block.page for block in BLOCKS}:
        text = (ROOT / name).read_text(encoding="utf-8")
        emptied = re.sub(r"(?s)(<!-- ([\w-]+): begin -->\n).*?(<!-- \2: end -->)", r"\1old\n\3", text)
        assert emptied != text
        (folder / name).write_text(emptied, encoding="utf-8")
    return folder


def test_the_command_writes_every_page_and_the_picture(command: Command, tmp_path: Path) -> None:
    folder = copy_of_pages(tmp_path)
    code, out, _ = command("jaxgpt-bench", "pages", "--root", folder, "--json")
    assert code == 0
    written = json.loads(out)["files"]
    assert set(written) == {*PICTURES, *(block.page for block in BLOCKS)}
    for name in written:
        if name not in PICTURES:
            assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    for name in PICTURES:
        assert texts((folder / name).read_text()) == texts((ROOT / name).read_text())


def test_nothing_is_written_where_markers_or_results_are_missing(command: Command, tmp_path: Path) -> None:
    folder = copy_of_pages(tmp_path)
    samples = folder / "docs" / "samples.md"
    whole = samples.read_text(encoding="utf-8")
    samples.write_text("no markers")
    before = (folder / "README.md").read_bytes()
    assert_one_line_error(command("jaxgpt-bench", "pages", "--root", folder), "samples: begin")
    samples.write_text(whole)
    (folder / RESULTS / "reference_quality.json").unlink()
    assert_one_line_error(command("jaxgpt-bench", "pages", "--root", folder), "reference_quality.json")
    assert (folder / "README.md").read_bytes() == before
    assert not (folder / PICTURE).exists()


def test_the_samples_say_first_that_they_are_poor_and_hold_every_text() -> None:
    report = results("reproduce_reference.json")
    page = samples_block(report)
    assert "repeats words" in page.split("\n")[0]
    samples = report["samples"]
    assert isinstance(samples, list)
    for sample in samples:
        assert beginning(sample["text"]) in page
        assert f"\n## {sample['prompt']}\n" in page
    greedy = {
        (sample["prompt"], sample["model"]): sample["text"] for sample in samples if not sample["temperature"]
    }
    prompts = {prompt for prompt, _ in greedy}
    alike = sum(greedy[prompt, "torch-fp32"] == greedy[prompt, "int8-dynamic"] for prompt in prompts)
    assert f"after {alike} of {len(prompts)} prompts" in page


def test_a_long_sample_is_cut_where_the_page_says_so() -> None:
    assert beginning("a \nb\n") == "a\nb"
    assert beginning("x" * 600) == "x" * 500 + " [...]"
