"""The page of a reproduction: all that is in its report, within its width, and where it falls short."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jaxgpt_bench.common.formatting import without_folders
from jaxgpt_bench.reproduce.page.claims import claims
from jaxgpt_bench.reproduce.page.render import commands, markdown_block, read_report, render, templates
from jaxgpt_bench.reproduce.page.tables import engine_table, quality_table, speed_table, stage_table
from matplotlib.textpath import TextPath
from small_report import COMMITTED, LONG, ROOT, claim_rows, committed_report, plain, small_report

from jaxgpt.shared.errors import UserError

WIDTHS = (1280, 390)
FONT_PIXELS, PADDING = 0.82 * 16, 0.8 * 16  # of a table with the class tight
PAGE_WIDTH = (60 - 2 * 1.2) * 16
SMALLEST_TEXT = 8  # points, in charts
SECTIONS = (
    "The claim", "Training", "Every model: quality", "Every model: speed", "Text from elsewhere",
    "Memorized?", "Samples, float32 and INT8 side by side", "Where it falls short", "Provenance",
)  # fmt: skip


def said(report: dict[str, Any], macro: str) -> list[str]:
    """The lines of a macro of sentences.jinja."""
    template = templates(escape=False).get_template("reproduce/page/sentences.jinja")
    return str(getattr(template.module, macro)(read_report(report))).split("\n")


def text_width(text: str) -> float:
    """Pixels of a text in a table, in DejaVu Sans, which is wider than the page's fonts."""
    return float(TextPath((0, 0), text, size=FONT_PIXELS).get_extents().width) if text.strip() else 0.0


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
