"""What a reproduction's page claims: which figures are compared, and in which words."""

import pytest
from jaxgpt_bench.common.formatting import difference_text, rate_text, signed, verdict_sentence
from jaxgpt_bench.common.rows import SpeedRow
from jaxgpt_bench.reproduce.page.claims import best_row, claims
from jaxgpt_bench.reproduce.page.render import markdown_block, read_report, render
from jaxgpt_bench.reproduce.page.tables import quality_table, speed_table
from small_report import claim_rows, small_report, speed_figures, speed_row


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
