"""HumanEval from the problems to the score: programs that a given text makes, run in the sandbox."""

from pathlib import Path

import pytest
from jaxgpt_bench.evaluate.human_eval import Problem
from jaxgpt_bench.evaluate.human_eval_task import evaluate_human_eval
from jaxgpt_bench.sandbox.sandbox import require_sandbox
from scripted_writer import scripted

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


@pytest.fixture
def sandbox() -> None:
    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


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
