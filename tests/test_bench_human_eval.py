"""HumanEval from the problems to the score: programs that a given text makes, run in the sandbox."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from jaxgpt_bench.evaluate.command import EvaluateOptions, evaluate
from jaxgpt_bench.evaluate.human_eval import Problem
from jaxgpt_bench.evaluate.human_eval_task import evaluate_human_eval
from scripted_writer import Script, scripted

from jaxgpt.shared.errors import UserError

PROBLEMS = [
    Problem(
        f"Test/{number}",
        f'def f{number}(x):\n    """Return {number}."""\n',
        f"def check(f):\n    assert f(1) == {number}\n",
        f"f{number}",
    )
    for number in range(2)
]
HOW = (2, 60, 0.8, 1.0, 0)  # samples, tokens, temperature, top-p, seed
TEXTS = (
    "\n    return 0\n\ndef g(x):\n    return 1 / 0\n",  # what follows the function is cut off
    "\n    return 7\n",
    "\n    return 1\nprint(f1(1) / 0)\n",
    "\n\n    y = x\n    return y",
)


@pytest.mark.usefixtures("sandbox")
def test_right_programs_pass_and_are_counted_by_problem(data: Path) -> None:
    (row,) = evaluate_human_eval([scripted(data, TEXTS)], PROBLEMS, *HOW)
    assert row.passed == {"Test/0": 1, "Test/1": 2}
    assert [(at.k, at.score.value) for at in row.pass_at] == [(1, 0.75)]
    assert row.ends == {"passed": 3, "AssertionError": 1}


def test_a_program_is_the_prompt_what_was_written_and_the_test() -> None:
    program = PROBLEMS[1].program("\n    return 1")
    assert program == (
        'def f1(x):\n    """Return 1."""\n    return 1\ndef check(f):\n    assert f(1) == 1\n\ncheck(f1)\n'
    )
    assert PROBLEMS[1].asked == 'def f1(x):\n    """Return 1."""'


class Failing(Script):
    """A session that fails before its first token."""

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        raise UserError("it fails")


@pytest.mark.usefixtures("sandbox")
def test_what_a_model_did_is_written_before_the_next_one_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = scripted(data, TEXTS)
    bad = dataclasses.replace(good, name="other", session=Failing(good.tokenizer, ()))
    monkeypatch.setattr("jaxgpt_bench.evaluate.writers.open_writers", lambda *_: [good, bad])
    problems, out = tmp_path / "problems.jsonl", tmp_path / "out.json"
    keys = {"name": "task_id"}
    rows = [{keys.get(key, key): value for key, value in vars(each).items()} for each in PROBLEMS]
    problems.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folders = (Path("model"), Path("other"))
    options = EvaluateOptions(folders, ("human-eval",), samples=2, tokens=60, problems=problems, out=out)
    with pytest.raises(UserError, match="it fails"):
        evaluate(options)
    (row,) = json.loads(out.read_text(encoding="utf-8"))["human_eval"]
    assert (row["model"], row["passed"]) == ("model", {"Test/0": 1, "Test/1": 2})
