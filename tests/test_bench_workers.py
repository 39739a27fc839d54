"""Processes that are measured."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import python
from jaxgpt_bench.common.workers import Worker
from waiting import wait_until

PROGRAM = """
import os, threading
from jaxgpt_bench.common.workers import serve
def prepare(order):
    if "linger" in order:
        threading.Thread(target=threading.Event().wait).start()
    if "sleep" in order:
        threading.Event().wait()
    if "fail" in order:
        raise ValueError("two\\nlines")
    if "refuse" in order:
        return lambda question: {"error": f"not {question['number']}"}
    return lambda question: {"pid": os.getpid(), "group": os.getpgid(0), "got": question["number"]}
serve(prepare)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "answers.py").write_text(PROGRAM, encoding="utf-8")
    _, variables = python("")
    return {"PYTHONPATH": f"{variables['PYTHONPATH']}:{tmp_path}"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_on_a_terminal_does_not_reach_a_worker_and_closing_ends_it(
    environment: dict[str, str],
) -> None:
    """A terminal sends it to every process of its foreground group."""
    worker = Worker("a worker", "answers", {}, environment)
    answer = worker.ask({"number": 3})
    assert answer["got"] == 3
    assert answer["group"] == answer["pid"] != os.getpgid(0)
    assert is_alive(answer["pid"])
    worker.close()
    assert not is_alive(answer["pid"])


def test_ctrl_c_while_a_worker_starts_ends_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def interrupt(worker: Worker) -> None:
        started.append(worker._process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Worker("a worker", "answers", {}, environment)
    assert not is_alive(started[0])


def test_a_worker_that_fails_says_why_in_one_line(
    environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"^a worker stopped with code 1: ValueError: two lines$"):
        Worker("a worker", "answers", {"fail": True}, environment)
    assert "Traceback" in capfd.readouterr().err


def test_an_answer_may_be_an_error_and_the_worker_goes_on(environment: dict[str, str]) -> None:
    """A program that takes no four bits is asked for its eight afterwards."""
    worker = Worker("a worker", "answers", {"refuse": True}, environment)
    try:
        assert [worker.ask({"number": number})["error"] for number in (4, 8)] == ["not 4", "not 8"]
    finally:
        worker.close()


def test_a_worker_that_says_it_stopped_and_does_not_end_is_ended(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's threads may keep a process that is done."""
    monkeypatch.setattr("jaxgpt_bench.common.workers.ENDING_S", 0.2)
    with pytest.raises(RuntimeError, match=r"^a worker stopped with code -9: ValueError: two lines$"):
        Worker("a worker", "answers", {"fail": True, "linger": True}, environment)


def test_a_worker_that_says_nothing_is_ended(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxgpt_bench.common.workers.ANSWER_S", 0.3)
    with pytest.raises(RuntimeError, match="a worker did not answer within 0 minutes"):
        Worker("a worker", "answers", {"sleep": True}, environment)


def test_a_worker_ends_with_a_parent_that_is_killed(environment: dict[str, str]) -> None:
    code = (
        "import os, sys; from jaxgpt_bench.common.workers import Worker; "
        f"print(Worker('a', 'answers', {{}}, {environment!r}).ask({{'number': 1}})['pid'], flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    line, variables = python(code)
    done = subprocess.run(line, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    worker = int(done.stdout)
    wait_until(lambda: not is_alive(worker), "the worker's end")
