import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jaxgpt_bench.common.formatting import (
    difference_text,
    rate_text,
    signed,
    verdict_sentence,
    without_folders,
)
from jaxgpt_bench.common.rows import SpeedRow
from jaxgpt_bench.quality.samples import FIXED_PROMPTS
from jaxgpt_bench.reproduce.page.claims import best_row, claims
from jaxgpt_bench.reproduce.page.render import commands, markdown_block, read_report, render, templates
from jaxgpt_bench.reproduce.page.tables import engine_table, quality_table, speed_table, stage_table
from matplotlib.textpath import TextPath

from jaxgpt.shared.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "reproduce_reference.json"
WIDTHS = (1280, 390)
LONG = "a" * 90
FONT_PIXELS, PADDING = 0.82 * 16, 0.8 * 16  # of a table with the class tight
PAGE_WIDTH = (60 - 2 * 1.2) * 16
SMALLEST_TEXT = 8  # points, in charts
MACHINE = {
    "cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "system": "Linux", "python": "3.11",
    "packages": {"jax": "1"}, "instruction_sets": ["avx2", "avx512_vnni"],
}  # fmt: skip
SECTIONS = (
    "The claim", "Training", "Every model: quality", "Every model: speed", "Text from elsewhere",
    "Learned by heart?", "Samples, float32 and INT8 side by side", "Where it falls short", "Provenance",
)  # fmt: skip


def speed_row(engine: str, precision: str, rate: float, **other: Any) -> dict[str, Any]:
    """A row as `jaxgpt-bench generate` gives it; the rate is that of the whole time."""
    return {
        "engine": engine, "precision": precision, "cached": True, "every_logit": False,
        "decode_tokens_per_s": {"median": 1.25 * rate, "min": rate, "max": 1.5 * rate},
        "seconds": {"median": 250 / rate, "min": 220 / rate, "max": 270 / rate},
        "prefill_tokens_per_s": {"median": 9 * rate, "min": 8 * rate, "max": 9 * rate},
        "bytes_per_token": 2_000_000, "read_gb_s": 0.006 * rate, "settings": {},
        "ceiling_tokens_per_s": 3 * rate, "ceiling_share": 1 / 3, "file_mb": 1.5,
        "peak_rss_mb": 300.0, "greedy_agrees": 240, "greedy_tokens": [1] * 250, **other,
    }  # fmt: skip


def speed_figures() -> dict[str, Any]:
    """What `jaxgpt-bench generate` gives, without the minutes."""
    found = [
        speed_row("jaxgpt-torch", "fp32", 50.0),
        speed_row("jaxgpt-native", "int8-dynamic", 400.0),
        speed_row("jaxgpt-torch", "int8-dynamic", 100.0),
        speed_row("jaxgpt-torch", "int8-static-qat", 120.0),
        speed_row("jaxgpt-flax", "fp32", 30.0),
        speed_row("transformers", "fp32", 60.0),
        speed_row("transformers", "fp32", 10.0, cached=False, every_logit=True),
        speed_row("torch-quantize-dynamic", "int8-dynamic", 66.0),
        speed_row("onnxruntime", "fp32", 80.0),
        speed_row("onnxruntime", "int8-weight-only", 420.0),
        speed_row("onnxruntime", "int4-weight-only", 900.0),
    ]
    model = {"n_layer": 2, "n_embd": 32}
    return {
        "settings": {"preset": None, "model": model, "tokens": 250, "prompt_tokens": 16, "threads": 2},
        "rounds": 1, "bandwidth_gb_s": [10.0], "rows": found,
        "left_out": {"openvino": "openvino not installed (pip install openvino)"},
        "machine": MACHINE,
        "date": "2026-01-03T04:05:06+00:00", "commit": "5beed",
    }  # fmt: skip


def small_report() -> dict[str, Any]:
    """A report.json as a run gives it, of few models."""
    row = {"val_loss": 2.0, "loss_increase": 0.0, "difference_error": None, "kl_mean": None, "fastest": None,
           "top1_agreement": 1.0, "parse_share": 0.5, "parse_cut": 5, "size_mb": 8.0,
           "val_bits_per_byte": 0.9, "kl_max": None, "max_abs_logit_diff": None}  # fmt: skip
    compared = {**row, "kl_mean": 1e-4}
    sample = {"prompt": FIXED_PROMPTS[0], "temperature": 0.0, "model": "torch-fp32",
              "finish_reason": "length",
              "text": "<script>alert(1)</script> " + "x" * 900, "tokens": 250,
              "verbatim": {"tokens": 3, "text": "x x"}}  # fmt: skip
    return {
        "preset": "cpu", "about": "a test", "date": "2026-01-04T04:05:06+00:00", "commit": "c0ffee",
        "command": f"jaxgpt-bench reproduce cpu --out runs/{LONG} --other-text 'head.jsonl=rows & more'",
        "machine": MACHINE,
        "data": {"source": "packages:numpy,jax", "revision": "numpy 2", "is_the_original_s": False,
                 "tokenizer": {"name": "bpe:384"},
                 "counts": {"train_documents": 9, "val_documents": 3, "val_overlapping": 208},
                 "manifest_sha256": "ab" * 32},
        "train": {"preset": "small", "steps": 40, "parameters": 5_900_000, "tokens_seen": 9_800_000,
                  "step_taken": 40, "xz_bits_per_byte": 1.6,
                  "curve": {"train": [[1, 5.0], [40, 2.5]], "val": [[20, 3.0], [40, 2.0]]}},
        "parity": {"max_abs_logit_diff": 1e-5},
        "files": {"model.safetensors": "cd" * 32},
        "quality": {"reference": "flax-fp32", "val_tokens": 1024, "val_bytes": 4096, "xz_bits_per_byte": 1.6,
                    "windows": "spread evenly over the validation split",
                    "parse_held_out": {"texts": 24, "parse": 13, "cut": 9},
                    "date": "2026-01-02T04:05:06+00:00", "commit": "900d", "parse_samples": 24,
                    "parse_tokens": 200, "machine": MACHINE},
        "models": [
            {**row, "name": "flax-fp32"},
            {**compared, "name": "torch-fp32", "loss_increase": -4e-9, "difference_error": 1e-9},
            {**compared, "name": "fp32-qat", "val_loss": 1.98, "loss_increase": -0.02,
             "difference_error": 0.001},
            {**compared, "name": "int8-dynamic", "val_loss": 2.001, "loss_increase": 0.001,
             "difference_error": 0.0007, "size_mb": 2.0},
            {**compared, "name": "int8-static-qat", "val_loss": 1.983, "loss_increase": -0.017,
             "difference_error": 0.001, "size_mb": 2.0,
             "parent": {"name": "fp32-qat", "difference": 0.003, "difference_error": 0.0004, "kl_mean": 3e-4,
                        "top1": 0.987}},
        ],
        "original": {"val_loss": (1.3223, 1.3350), "size_mb": (620.33, 148.88), "tokens_per_s": (2.95, 4.01)},
        "speed": speed_figures(),
        "samples": [sample, {**sample, "model": "int8-dynamic"},
                    {**sample, "temperature": 0.8, "text": "def average():\n    pass"}],
        "sampling": {"seed": 0, "longest": 250},
        "other_text": [{"file": "head.jsonl", "about": "rows & more", "sha256": "ef" * 32, "documents": 356,
                        "tokens": 9, "bytes": 30, "documents_shared_with_training": 0,
                        "xz_bits_per_byte": 1.8,
                        "rows": [{"name": "flax-fp32", "loss": 3.5, "loss_increase": 0.0,
                                  "difference_error": None, "bits_per_byte": 1.9},
                                 {"name": "int8-dynamic", "loss": 3.6, "loss_increase": 0.1,
                                  "difference_error": 0.02, "bits_per_byte": 1.95}]}],
        "memorization": {"overlap": {"run_tokens": 50, "documents": 1913, "sharing": 0,
                                     "dropped": 208, "too_short": 77},
                         "train_tokens": 12_875_930,
                         "summary": [
                             {"name": "held-out", "texts": 24, "median_tokens": 12.5, "max_tokens": 49,
                              "whole": 0},
                             {"name": "int8-dynamic", "texts": 24, "median_tokens": 9.0, "max_tokens": 31,
                              "whole": 0}]},
        "stages": [{"stage": "data", "kept": True, "seconds": 0.0},
                   {"stage": "train", "kept": True, "seconds": 0.0,
                    "made": {"date": "2026-01-01T04:05:06+00:00", "commit": "7ea1", "seconds": 4321.0}}],
    }  # fmt: skip


def committed_report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(COMMITTED.read_text())
    return report


def plain(page: str) -> str:
    return re.sub(r"<[^>]+>", "\n", page).replace("&#39;", "'").replace("&amp;", "&")


def said(report: dict[str, Any], macro: str) -> list[str]:
    """The lines of a macro of sentences.jinja."""
    template = templates(escape=False).get_template("reproduce/page/sentences.jinja")
    return str(getattr(template.module, macro)(read_report(report))).split("\n")


def text_width(text: str) -> float:
    """Pixels of a text in a table, in DejaVu Sans, which is wider than the page's fonts."""
    return float(TextPath((0, 0), text, size=FONT_PIXELS).get_extents().width) if text.strip() else 0.0


def claim_rows(report: dict[str, Any]) -> list[list[str]]:
    """The table of claims, as docs/reproduction.md has it."""
    lines = markdown_block(report).split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("| float32 to INT8"))
    return [line.strip("| ").split(" | ") for line in lines[at + 2 : at + 8]]


@pytest.fixture(scope="module", params=["small", "committed"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return small_report() if request.param == "small" else committed_report()


def test_the_page_has_every_section_and_row_and_fetches_nothing(report: dict[str, Any]) -> None:
    page = render(report)
    assert tuple(re.findall(r"<h2[^>]*>(.*?)</h2>", page)) == SECTIONS
    text = plain(page)
    typed = read_report(report)
    tables = (quality_table(typed), speed_table(typed), stage_table(typed))
    for cells in (*(cells for table in tables for cells in table.cells), *claim_rows(report)):
        assert all(cell in text for cell in cells)
    sentences = (*said(report, "conclusion"), *said(report, "limits"))
    assert all(line in text for line in (*sentences, *commands(typed)))
    assert all(sentence in markdown_block(report) for sentence in said(report, "conclusion"))
    assert (len(said(report, "conclusion")), len(said(report, "limits"))) == (4, 10)
    for line in ("the earlier project's fp32", "1.3223 to 1.3350 (+0.0127)", "0 of 1,913", "held-out code",
                 "→ jaxgpt-native int8-dynamic", "transformers fp32, no KV cache, every logit",
                 "2 validation points"):  # fmt: skip
        assert line in text
    assert ", ".join(report["speed"]["machine"]["instruction_sets"]) in text
    assert page.count("<svg") == 3
    assert "<th></th>" not in page
    assert "<script" not in page
    assert "-0.00000" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert not re.search(r"url\((?!#)|@import", page)
    # What is left of addresses are the names of XML's namespaces, which nothing fetches.
    assert set(re.findall(r"https?://[^\"'<> ]+", page)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    with pytest.raises(UserError, match="does not fit this version"):
        render({**report, "memorization": {}})


def test_a_run_that_was_changed_on_its_way_says_so() -> None:
    report = small_report()
    assert "changed on purpose" not in render(report)
    changed = {"train.max_steps": {"from": 20, "to": 40}, "data": {"from": {}, "to": {}}}
    report["train"]["overrides"] = [{"step": 20, "changed": changed}]
    assert "After step 20 the run was changed on purpose: train.max_steps, data." in render(report)


def test_only_like_is_judged_against_the_earlier_project_and_every_pair_is_named() -> None:
    report = small_report()
    loss, size, method, anyone, own, uncached = claim_rows(report)
    assert (loss[0], loss[3]) == ("validation loss, nats", "not comparable: another model, another text")
    assert size[3] == "shrinks the file less"
    assert method[2:] == [
        "60.0 to 66.0 (1.10 times): transformers fp32 → torch-quantize-dynamic int8-dynamic", "gains less",
    ]  # fmt: skip
    assert anyone[2].startswith("80.0 to 420 (5.25 times): onnxruntime fp32 → onnxruntime int8-weight-only")
    assert own[2].startswith("50.0 to 400 (8.00 times): jaxgpt-torch fp32 → jaxgpt-native int8-dynamic")
    assert uncached[2].startswith("10.0 to 400 (40.00 times): transformers fp32, no KV cache, every logit")
    assert all("together: no verdict" in row[3] for row in (own, uncached))
    rows = report["speed"]["rows"]
    for rate, so in ((55.0, "is slower"), (66.0, "gains less"), (90.0, "gains more")):
        rows[7] = speed_row("torch-quantize-dynamic", "int8-dynamic", rate)
        assert claim_rows(report)[2][3] == so
    del rows[7]
    assert claim_rows(report)[2][2:] == ["not measured"]


def test_claims_are_figures_of_the_rows_they_name() -> None:
    found = claims(read_report(small_report()))
    assert found.loss.difference == pytest.approx(0.001)
    assert found.size.times_smaller == 4.0
    assert found.their_size.times_smaller == pytest.approx(620.33 / 148.88)
    fastest, own = found.speeds["fastest of any"], found.speeds["this project's"]
    assert fastest is not None
    assert own is not None
    assert [row.name for row in fastest.rows] == ["onnxruntime fp32", "onnxruntime int8-weight-only"]
    assert own.rates.times == pytest.approx(400 / 50)


def test_the_earlier_project_s_data_is_called_by_its_name() -> None:
    report = small_report()
    assert "not the earlier project's data set" in markdown_block(report)
    report["data"]["is_the_original_s"] = True
    assert "of flytech/python-codes-25k, the earlier project's data set" in markdown_block(report)
    assert "not the earlier project" not in render(report)


def test_the_fastest_engine_of_this_project_stands_for_a_model() -> None:
    rows = [SpeedRow.from_json(row) for row in speed_figures()["rows"]]
    for name, engine in (
        ("int8-dynamic", "jaxgpt-native"), ("torch-fp32", "jaxgpt-torch"), ("flax-fp32", "jaxgpt-flax"),
    ):  # fmt: skip
        found = best_row(name, rows)
        assert found is not None
        assert found.engine == engine
    assert best_row("int8-weight-only", rows) is None  # measured with a peer alone
    assert best_row("fp32-qat", rows) is None


def test_numbers_are_printed_with_what_they_rest_on() -> None:
    assert signed(-4.7e-9) == "0"
    assert difference_text(-4.7e-9, 1e-9) == "0"
    assert difference_text(0.001, 0.0007, star=True) == "+0.00100 ± 0.00070 *"
    assert difference_text(-0.02, 0.001) == "-0.02000 ± 0.00100"
    assert difference_text(0.001, 1e-7) == "+0.00100 ± less than 0.00001"
    assert (rate_text(3331.98), rate_text(99.94)) == ("3,332", "99.9")
    cells = {row[0]: row for row in speed_table(read_report(small_report())).cells}
    assert cells["int8-dynamic"][2:] == ("625 ms (550–675)", "500 (400–600)", "33%", "240 of 250")
    assert cells["torch-fp32"][2:4] == ("5.00 s (4.40–5.40)", "62.5 (50.0–75.0)")
    assert set(cells) == {"flax-fp32", "torch-fp32", "int8-dynamic", "int8-static-qat"}


def test_the_trained_on_model_is_held_against_its_own_parent() -> None:
    rows = {row[0]: row for row in quality_table(read_report(small_report())).cells}
    assert rows["fp32-qat"][2] == "-0.02000 ± 0.00100"
    assert rows["… against fp32-qat"][2:5] == ("+0.00300 ± 0.00040", "3.0e-04", "98.70%")
    assert rows["int8-dynamic"][5] == "12 of 24 (5 cut)"
    assert rows["held-out code itself"][5] == "13 of 24 (9 cut)"


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    page, report = COMMITTED.with_suffix(".html").read_text(), committed_report()
    assert report["date"][:10] in page
    text = plain(page)
    typed = read_report(report)
    for cells in (*quality_table(typed).cells[:-2], *speed_table(typed).cells):
        assert all(cell in text for cell in cells)
    for cells in quality_table(typed).cells[-2:]:  # the page calls the earlier project by another name
        assert all(cell in text for cell in cells[1:])


def test_the_native_engine_is_said_for_the_models_that_it_computed() -> None:
    report = small_report()
    for page in (render(report), markdown_block(report)):  # of a report that does not tell
        assert "by the native engine" not in page
        assert "not with the native engine" not in page
    for row in report["models"]:
        row["engine"] = "jaxgpt-native" if row["name"].startswith("int8") else "jaxgpt-torch"
    said = (
        "PyTorch modules (int8-dynamic, int8-static-qat by the native engine, which gives the modules' bits"
    )
    assert said in plain(render(report))
    assert said in markdown_block(report)


def test_the_page_says_where_it_fails_and_what_bounds_it() -> None:
    report = small_report()
    text = plain(render(report))
    assert "less than about 29 percentage points" in text
    assert "1.900 bits a byte where xz -9e takes 1.800, worse than xz: there it fails" in text
    assert "which can't be told from none" in text
    assert "after prepare dropped 208 that did; 77 are too short to" in text
    assert "openvino (openvino not installed (pip install openvino))" in text
    assert "Trained: 2026-01-01, commit 7ea1, 4,321 s." in text
    assert "cut at 250 tokens" in text
    report["other_text"][0]["xz_bits_per_byte"] = 2.0
    report["models"][3]["difference_error"] = 0.0001
    report["speed"]["left_out"] = {}
    text = plain(render(report))
    assert "better than xz" in text
    assert "fails" not in text
    assert "can't be told from none." not in text
    assert "No engine was left out." in text


def test_the_page_begins_with_a_verdict_in_words(report: dict[str, Any]) -> None:
    text = plain(render(report))
    found = claims(read_report(report))
    own = found.speeds["this project's"]
    assert own is not None
    smaller, faster = found.size.times_smaller, own.rates.times
    said = f"INT8 makes this model {smaller:.1f} times smaller and writes {faster:.1f} times as many tokens a"
    assert 0 < text.index(said) < text.index("By jaxgpt, which trains")


def test_a_verdict_says_what_a_loss_means() -> None:
    arguments = ("INT8", 3.84, 7.24)
    assert verdict_sentence(*arguments, 0.0005, False) == (
        "INT8 makes this model 3.8 times smaller and writes 7.2 times as many tokens a second as float32; "
        "the right next token gets 0.05% less likely (+0.00050 nats)."
    )
    assert "0.10% more likely (-0.00100 nats)" in verdict_sentence(*arguments, -0.001, False)
    for loss, unclear in ((0.0005, True), (1e-9, False)):
        assert "costs in quality can't be told from nothing" in verdict_sentence(*arguments, loss, unclear)
    assert "tokens a second" not in verdict_sentence("INT8", 3.84, None, 0.0005, False)


def test_pages_and_figures_name_no_folder_of_a_machine() -> None:
    command = (
        "jaxgpt-bench quality --out /home/a/b.json --x=/q/r tokens/s hub:a/b runs/x '/a/b c' 5 / 3 file:/x"
    )
    assert without_folders(command) == (
        "jaxgpt-bench quality --out b.json --x=r tokens/s hub:a/b runs/x 'b c' 5 / 3 file:/x"
    )
    report = small_report()
    report["data"]["source"] = "/home/somebody/texts"
    assert "/home/somebody" not in render(report)


def test_tables_and_charts_fit_their_page(report: dict[str, Any]) -> None:
    """Widths by a wide font: at 1280 pixels a page is 60 rem, less its margins; on a phone 350 pixels."""
    typed = read_report(report)
    for table in (quality_table(typed), speed_table(typed), engine_table(typed), stage_table(typed)):
        columns = zip(table.titles, *table.cells, strict=True)
        widths = [max(map(text_width, [*title.split(), *cells])) + PADDING for title, *cells in columns]
        assert sum(widths) <= PAGE_WIDTH
    page = render(report)
    assert "min-width: 38rem" not in page
    for width in re.findall(r'<svg[^>]* width="([\d.]+)pt"', page):
        assert SMALLEST_TEXT * 350 / float(width) >= 8  # pixels of a chart's smallest text there


def test_what_runs_it_again_is_whole_and_the_other_text_optional() -> None:
    install, command, *optional = commands(read_report(small_report()))[1:]
    assert install == "pip install -c constraints.txt -e '.[train,export,bench,peers]'"
    extras = re.search(
        r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
    )
    assert extras is not None
    assert all(f"\n{name} = " in extras[1] for name in ("train", "export", "bench", "peers", "cuda"))
    assert command == "jaxgpt-bench reproduce cpu --out runs/" + LONG
    assert "--other-text 'head.jsonl=rows & more'" in "".join(optional)
    assert "ef" * 32 in "".join(optional)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium is installed here")
def test_the_page_does_not_scroll_sideways_on_a_desktop_or_a_phone(
    report: dict[str, Any], tmp_path: Path
) -> None:
    widths = "[document.scrollingElement.scrollWidth, innerWidth]"
    tell = f"<script>onload = () => parent.postMessage({widths}, '*')</script>"
    (tmp_path / "page.html").write_text(render(report).replace("</body>", tell + "</body>"))
    frames = "".join(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>' for width in WIDTHS
    )
    note = "onmessage = event => { document.body.dataset['w' + event.data[1]] = event.data[0] }"
    (tmp_path / "both.html").write_text(f"<body><script>{note}</script>{frames}</body>")
    done = subprocess.run(
        [str(browser()), "--headless", "--no-sandbox", "--disable-gpu",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         (tmp_path / "both.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = {int(a): int(b) for a, b in re.findall(r'data-w(\d+)="(\d+)"', done.stdout)}
    assert set(found) == set(WIDTHS), done.stderr[-1000:]
    assert all(scroll <= width for width, scroll in found.items()), found


def test_the_reproduction_page_comes_from_committed_results() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    table = text.partition("<!-- reproduction: begin -->")[2].partition("<!-- reproduction: end -->")[0]
    report = committed_report()
    assert table.strip() == markdown_block(report).strip()
    assert len(report["models"]) >= 7
    assert report["memorization"]["overlap"]["sharing"] == 0
