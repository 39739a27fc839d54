"""Processes that share a preparation: left over from another one, or late."""

import errno
import os
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error, write_jsonl

from jaxgpt.data.sources import ReadOptions
from jaxgpt.data.stages import worker
from jaxgpt.data.stages.order import STAGES
from jaxgpt.data.stages.read import READ
from jaxgpt.data.work.plan import make_plan, open_work
from jaxgpt.data.work.work_folder import StoppedError
from jaxgpt.shared.errors import UserError


def test_a_process_of_another_plan_leaves_the_new_one_alone(tmp_path: Path) -> None:
    def plan_of(name: str) -> dict[str, object]:
        write_jsonl(tmp_path / name, [{"text": f"{name} {n}"} for n in range(9)])
        return make_plan(
            str(tmp_path / name), ReadOptions(), tokenizer="bpe:300", special=(), val_fraction=0.3,
            answers_only=False,
        )  # fmt: skip

    out = tmp_path / "d"
    old, new = plan_of("old.jsonl"), plan_of("new.jsonl")
    left_over = open_work(out, old, STAGES)
    work = open_work(out, new, STAGES)
    with pytest.raises(StoppedError):
        left_over.work_through(READ)
    left_over.fail(UserError("too late"), "too late")
    work.raise_failure()
    assert not work.is_done("read", 0)
    assert not [path for path in work.folder.iterdir() if path.name not in ("plan.json", work.place.name)]


def test_joining_what_has_failed_says_why(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a text"}])
    plan = make_plan(
        str(source), ReadOptions(), tokenizer="bpe:300", special=(), val_fraction=0.3, answers_only=False
    )
    open_work(tmp_path / "d", plan, STAGES).fail(OSError(errno.ENOSPC, "full"), "shard: full")
    join = ("jaxgpt", "prepare", "--out", tmp_path / "d", "--join", "--workers", 1)
    assert_one_line_error(command(*join), "shard: full; what is done is kept")
    (tmp_path / ".d.tmp-work" / "plan.json").write_text("{")
    assert_one_line_error(command(*join), "plan.json is not JSON")
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)  # it ignores Ctrl-C, in its own process
    assert worker.main(tmp_path / ".d.tmp-work", os.getppid(), 1) == 2
