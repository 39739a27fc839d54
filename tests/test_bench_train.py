import json
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error

SMALL = ("tiny", "--vocab-size", 300, "--block-size", 32, "--batch-size", 4)


@pytest.mark.slow
def test_both_trainers_do_the_same_work_and_are_timed_in_turns(command: Command, tmp_path: Path) -> None:
    """Losses of the same steps agree: same weights, batches, optimizer. PyTorch's step is compiled."""
    out = tmp_path / "train.json"
    more = ("--grad-accum-steps", 2, "--rounds", 2, "--steps", 3, "--devices", 1, 2, "--out", out)
    more = ("--optimizer", "adamw", *more)
    code, _, err = command("jaxgpt-bench", "train", *SMALL, *more)
    assert code == 0
    assert "no MFU" in err
    figures = json.loads(out.read_text())
    assert {"machine", "date", "commit", "command"} <= figures.keys()
    assert [(row["engine"], row["devices"]) for row in figures["rows"]] == [
        ("jaxgpt", 1),
        ("jaxgpt", 2),
        ("pytorch", 1),
        ("pytorch", 1),
    ]
    assert {row["tokens_per_step"] for row in figures["rows"]} == {128}
    for row in figures["rows"]:
        assert row["step_ms"]["min"] > 0
        assert row["step_cpu_ms"]["min"] > 0
        assert 0 < row["product_share"] < 1
        assert row["mfu"] is None
        assert len(row["losses"]) == 3 + 2 * 3
    for row in figures["rows"][:2]:
        assert row["against_pytorch"]["step_time_ratio"]["min"] > 0
        # float32 sums in another order, a few steps of AdamW
        assert row["against_pytorch"]["losses_differ_by"] <= 1e-4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rounds", 0), "--rounds"),
        (("--devices", 0), "--devices"),
        (("--batch-size", 3, "--grad-accum-steps", 2), "divisible by grad_accum_steps"),
        (("--batch-size", 4, "--devices", 3), "does not divide over 3 devices"),
    ],
)
def test_bad_settings_are_one_line(command: Command, more: tuple[object, ...], said: str) -> None:
    assert_one_line_error(command("jaxgpt-bench", "train", "tiny", *more), said)
