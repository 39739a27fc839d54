"""`jaxgpt-bench evaluate`: what models can do."""

import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.evaluate.answers import (
    answer_docstrings,
    answer_requests,
    request_end_of,
    split_document,
    spread_documents,
)
from jaxgpt_bench.evaluate.functions import cut_in_the_middle, evaluate_functions
from jaxgpt_bench.evaluate.human_eval import TOO_LONG
from jaxgpt_bench.evaluate.requests import REQUESTS
from jaxgpt_bench.evaluate.rows import AnswersRow
from jaxgpt_bench.evaluate.statistics import (
    mean_and_error,
    paired_difference,
    pass_at_k,
    smallest_shown,
)
from jaxgpt_bench.evaluate.tables import samples_markdown
from jaxgpt_bench.evaluate.writers import Writer
from jaxgpt_bench.pages.blocks import answers as pages_of_answers
from jaxgpt_bench.quality.samples import val_documents
from jaxgpt_bench.sandbox.programs import edit_similarity, program_of
from jaxgpt_bench.sandbox.sandbox import run_programs
from scripted_writer import scripted

from jaxgpt.data.requests.repetition import most_repeated, words_of
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import load_tokenizer

# A right program for each request, in order.
RIGHT = (
    "def calculate_average(numbers):\n    return sum(numbers) / len(numbers)",
    "def reverse_string(s):\n    return s[::-1]",
    "def is_prime(n):\n    return n > 1 and all(n % i for i in range(2, n))",
    "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
    "def find_largest(numbers):\n    return max(numbers)",
    "def count_vowels(s):\n    return sum(c in 'aeiou' for c in s)",
    "def remove_duplicates(items):\n    return list(set(items))",
    "def is_palindrome(s):\n    return s == s[::-1]",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    "def sort_list(items):\n    items.sort()",
    "def merge_dicts(a, b):\n    return {**a, **b}",
    "def celsius_to_fahrenheit(c):\n    return c * 9 / 5 + 32",
    "def flatten(nested):\n    for part in nested:\n        yield from part",
    "def count_words(text):\n    return len(text.split())",
    "def sum_of_digits(n):\n    return sum(map(int, str(n)))",
    "def is_leap_year(y):\n    return y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)",
    "import math\n\ndef area_of_circle(r):\n    return math.pi * r * r",
    "def common_elements(a, b):\n    return [x for x in a if x in b]",
    "def are_anagrams(a, b):\n    return sorted(a) == sorted(b)",
)


@pytest.mark.usefixtures("sandbox")
def test_a_right_program_passes_each_check_and_a_wrong_one_none() -> None:
    assert len(REQUESTS) == len(RIGHT) == len({request.text for request in REQUESTS}) == 20
    assert REQUESTS[0].text == "Python program to calculate the average"
    names = [(program_of(code).functions or ("",))[-1] for code in RIGHT]
    assert all(request.fits(name) for request, name in zip(REQUESTS, names, strict=True))
    assert not any(request.fits("helper") for request in REQUESTS)
    right = [
        f"{code}\nf = {name}\n{request.check}"
        for code, name, request in zip(RIGHT, names, REQUESTS, strict=True)
    ]
    wrong = [f"def f(*arguments):\n    return None\n{request.check}" for request in REQUESTS]
    assert [end.why for end in run_programs(right)] == ["passed"] * 20
    assert not any(end.passed for end in run_programs(wrong))


@pytest.mark.usefixtures("sandbox")
def test_answers_are_judged(data: Path) -> None:
    texts = [
        f"\n```python\n{RIGHT[0]}\n```\nIt adds and divides.",
        "\n```python\ndef reverse_string(s):\n    return s\n```",
        "def other(n):\n    return n",
        "```python\ndef factorial(\n```",
    ]
    row = answer_requests(scripted(data, texts), REQUESTS[:4], Sampling(0.8), 200)
    assert [answer.fits for answer in row.answers] == [True, True, False, False]
    assert [answer.parses for answer in row.answers] == [True, True, True, False]
    assert [answer.passed for answer in row.answers] == [True, False, False, False]
    assert [answer.why.partition(":")[0] for answer in row.answers] == [
        "passed",
        "AssertionError",
        "no function whose name fits",
        "no function whose name fits",
    ]
    assert all(answer.ended for answer in row.answers)
    assert type(row).from_json(json.loads(json.dumps(row.to_json()))) == row
    page = samples_markdown([row])
    assert "### Python program to calculate the average" in page
    assert "defines `calculate_average`, ended by itself, **right**" in page


def test_held_out_docstrings_name_the_same_function(data: Path) -> None:
    documents = ["Add two numbers. add(a, b) ```python\ndef add(a, b):\n    return a + b\n```"]
    greedy = Sampling(0.0)
    row = answer_docstrings(scripted(data, ["```python\ndef add(x): return x\n```"]), documents, greedy, 50)
    (answer,) = row.answers
    assert answer.prompt == "Add two numbers. add(a, b)"
    assert (answer.function, answer.passed, answer.finish_reason) == ("add", None, "endoftext")
    row = answer_docstrings(scripted(data, ["def sub(x): return x"]), documents, greedy, 50)
    assert row.answers[0].function == ""


def test_held_out_documents_are_those_whose_request_leaves_room_for_an_answer(
    command: Command, data: Path, fp32: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(data)
    short, long = (f"{'Add two numbers. ' * times}\n```python\ndef add(): pass\n```" for times in (1, 99))
    most = len(tokenizer.encode(split_document(short)[0]))
    documents = [long, short, "prose", long]
    assert spread_documents(documents, 20, tokenizer, most) == [short]
    assert spread_documents(documents, 20, tokenizer, most - 1) == []
    source = tmp_path / "prose.jsonl"
    source.write_text("".join(json.dumps({"text": f"{place} is a number."}) + "\n" for place in range(400)))
    made = ("--tokenizer", data, "--val-fraction", 0.3, "--out", tmp_path / "prose")
    assert command("jaxgpt", "prepare", "--source", source, *made)[0] == 0
    asked = ("jaxgpt-bench", "evaluate", "--artifact", fp32, "--data", tmp_path / "prose", "--threads", 1)
    refusal = command(*asked, "--task", "docstrings", "--out", tmp_path / "none.json")
    assert_one_line_error(refusal, "no held-out document with code in a fence", "leave --task docstrings out")
    assert not (tmp_path / "none.json").exists()


def test_a_text_that_is_cut_did_not_end_and_repeats(data: Path) -> None:
    asked = ["Say it. ```python\nx\n```"]
    row = answer_docstrings(scripted(data, ["x = 0\n" * 40]), asked, Sampling(0.8), 60)
    (answer,) = row.answers
    assert answer.finish_reason == "length"
    assert not answer.ended
    assert answer.most_repeated > 5
    assert answer.most_repeated_words > 5
    name = dataclasses.replace(answer, text="celsius = celsius * celsius + celsius - celsius / celsius")
    assert name.most_repeated_words == 1  # one word six times, however many tokens it is


@pytest.mark.parametrize(
    ("text", "code", "functions"),
    [
        ("\n```python\ndef f(): pass\n```\nand more ``` here", "def f(): pass\n", ("f",)),
        ("def f(): pass\n```\nprose", "def f(): pass\n", ("f",)),
        ("Sure:\n```py\nclass A:\n    def g(self): pass\n```", "class A:\n    def g(self): pass\n", ("g",)),
        ("```\nx = 1", "x = 1", ()),
        ("Solution\n```python\ndef gcd(a, b): pass\n```", "def gcd(a, b): pass\n", ("gcd",)),
        ("average(numbers)\n```\ndef h(): pass\n```", "def h(): pass\n", ("h",)),
        ("import math\nprint(math.pi)\n```\nThat prints pi.\n", "import math\nprint(math.pi)\n", ()),
        ("class A:\n    x = 1\n```\nprose", "class A:\n    x = 1\n", ()),
        ("prose without code", "prose without code", None),
        ("", "", None),
    ],
)
def test_the_program_of_a_text(text: str, code: str, functions: tuple[str, ...] | None) -> None:
    program = program_of(text)
    assert (program.code, program.functions) == (code, functions)


def test_repetition_and_similarity() -> None:
    assert most_repeated([1, 2, 3]) == 0
    assert most_repeated([1, 2, 3, 4, 5]) == 1
    assert most_repeated([7] * 10) == 7
    assert words_of("is_prime(n)  ==\tTrue") == ["is_prime", "(", "n", ")", "=", "=", "True"]
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == 1.0
    assert edit_similarity("abc", "") == 0.0


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(5, 2, 3), (10, 0, 1), (6, 6, 2), (20, 19, 4), (7, 3, 7)]
)
def test_pass_at_k_is_the_share_of_choices(samples: int, passed: int, k: int) -> None:
    tries = [True] * passed + [False] * (samples - passed)
    choices = list(itertools.combinations(tries, k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(UserError, match="at least 10 samples"):
        pass_at_k(5, 1, 10)


def test_errors() -> None:
    values = [0.0, 1.0, 1.0, 0.0]
    mean, error = mean_and_error(values)
    assert mean == 0.5
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    assert paired_difference(values, values) == (0.0, 0.0)
    assert smallest_shown([0.0] * 164) == pytest.approx(3 / 164)
    assert smallest_shown([0.5] * 164, [0.5] * 164) == pytest.approx(3 / 164)  # the same says no more
    shifted = [0.0, 0.01] * 50
    assert smallest_shown([a + 0.5 for a in shifted], [0.5] * 100) < 0.0011  # paired: not of two lone scores
    spread = [0.0, 1.0] * 50
    assert smallest_shown(spread) == pytest.approx(1.96 * math.sqrt(2) * np.std(spread, ddof=1) / 10)


def test_a_function_is_cut_before_a_line_in_its_middle() -> None:
    document = "Add. add(a) ```python\ndef add(a):\n    b = a + 1\n\n    return b\n```"
    function = cut_in_the_middle(document)
    assert function is not None
    assert function.prompt == "Add. add(a) ```python\ndef add(a):"
    assert (function.code, function.next_line) == ("def add(a):", "    b = a + 1")
    after_blanks = cut_in_the_middle("Add.\n```python\ndef add(a):\n    \n\n    a += 1\n    return a\n```")
    assert after_blanks is not None
    assert after_blanks.prompt == "Add.\n```python\ndef add(a):"
    assert cut_in_the_middle("Add. ```python\nx = 1\n```") is None
    assert split_document("no code here") == ("", "no code here")
    assert split_document("Add.\n```python\nx\n```") == ("Add.\n", "```python\nx\n```")


def test_a_prompt_is_cut_between_tokens(data: Path) -> None:
    """The tokens of a held-out document begin with those of its prompt: none is of both sides of the cut."""
    tokenizer = load_tokenizer(data)
    for document in val_documents(open_dataset(data).val, tokenizer)[:20]:
        function = cut_in_the_middle(document)
        assert function is not None
        asked = tokenizer.encode(function.prompt)
        assert tokenizer.encode(document)[: len(asked)] == asked
        with_line_end = tokenizer.encode(f"{function.prompt}\n")
        assert tokenizer.encode(document)[: len(with_line_end)] != with_line_end


def test_the_next_line_is_the_first_after_the_prompt_s_line_end(data: Path) -> None:
    document = "Add. add(a) ```python\ndef add(a):\n    return a\n    # done\n```"
    function = cut_in_the_middle(document)
    assert function is not None
    judged = {
        "\n    return a\n    # done\n```": (1.0, 1.0, 1.0),
        "\n\n    return a\n": (1.0, 1.0, 1.0),  # blank lines are none
        "\nreturn a\n": (0.0, 1.0, 0.0),
        " return a\n": (0.0, 1.0, 1.0),  # on the prompt's own line: another program than the function
        ", b\n    return a\n": (0.0, edit_similarity(", b", "return a"), 0.0),
        "\n": (0.0, 0.0, 0.0),
    }
    for text, (next_line, similarity, parse) in judged.items():
        (row,) = evaluate_functions([scripted(data, [text])], [function], 60)
        found = (row.next_line.value, row.edit_similarity.value, row.parses.value)
        assert found == (next_line, similarity, parse), text


def test_a_request_ends_as_those_of_the_training_text_do() -> None:
    lines, spaces = "Add a.\n```python\nx\n```", "Add a. add(a) ```python\nx\n```"
    assert request_end_of([lines, lines, spaces, "no code"]) == "\n"
    assert request_end_of([lines, spaces, spaces]) == ""
    assert request_end_of([]) == ""


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "HumanEval.jsonl.gz"
    made = [
        {
            "task_id": f"Test/{number}",
            "prompt": f"def f{number}(x):\n",
            "test": f"def check(f):\n    assert f(1) == {number}\n",
            "entry_point": f"f{number}",
        }
        for number in range(2)
    ]
    long = "def f2(x):\n" + "    # what stands here is longer than any context of the models\n" * 40
    made.append({"task_id": "Test/2", "prompt": long, "test": "", "entry_point": "f2"})
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, made)).encode()))
    return path


@pytest.mark.usefixtures("sandbox")
def test_the_command_measures_every_task(
    command: Command, tmp_path: Path, data: Path, fp32: Path, int8_dynamic: Path, problems: Path
) -> None:
    out, page = tmp_path / "evaluate.json", tmp_path / "answers.md"
    tasks = ("requests", "docstrings", "functions", "human-eval")
    arguments = ("--artifact", fp32, int8_dynamic, "--data", data, "--task", *tasks, "--tokens", 8)
    more = ("--texts", 3, "--samples", 2, "--draws", 2, "--problems", problems, "--out", out, "--page", page)
    code, _, err = command("jaxgpt-bench", "evaluate", *arguments, *more)
    assert code == 0, err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["kind"] for row in found["human_eval"]] == ["fp32", "int8-dynamic"]
    assert [len(row["answers"]) for row in found["answers"]] == [20, 3] * 6
    assert [row["temperature"] for row in found["answers"]] == [0.8] * 8 + [0.0] * 4
    assert [row["min_p"] for row in found["answers"]] == [0.05] * 8 + [0.0] * 4
    weights = {row["kind"]: row["weights_sha256"] for row in found["answers"]}
    for kind, folder in (("fp32", fp32), ("int8-dynamic", int8_dynamic)):
        assert weights[kind] == sha256_of(folder / "model.safetensors")
    first, again = (found["answers"][place]["answers"] for place in (0, 4))
    assert [a["prompt"] for a in first] == [a["prompt"] for a in again]
    assert [a["text"] for a in first] != [a["text"] for a in again]
    first, second = found["functions"]
    assert first["bits_per_byte"]["difference"] is None
    assert second["bits_per_byte"]["difference"] == pytest.approx(
        second["bits_per_byte"]["value"] - first["bits_per_byte"]["value"], abs=1e-9
    )
    assert 0 < first["bits_per_byte"]["value"] < 8
    (at_1,) = found["human_eval"][0]["pass_at"]
    assert (at_1["k"], at_1["score"]["value"]) == (1, 0.0)
    assert at_1["smallest_shown"] == pytest.approx(1.0)
    ends = found["human_eval"][0]["ends"]
    assert sum(ends.values()) == 6
    assert ends[TOO_LONG] == 2
    assert "1 of 3 problems are longer than its context" in err
    assert "pass@1 is 0.00%" in err
    assert page.read_text(encoding="utf-8").count("\n**int8-dynamic**, temperature 0: ") == 23
    assert "unfinished" not in found


@pytest.mark.usefixtures("sandbox")
def test_figures_that_end_halfway_say_so_and_become_no_page(
    command: Command, tmp_path: Path, fp32: Path, int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "answers.json"

    def once(writer: Writer, *arguments: Any) -> AnswersRow:
        if writer.kind != "fp32":
            raise KeyboardInterrupt
        return answer_requests(writer, *arguments)

    monkeypatch.setattr("jaxgpt_bench.evaluate.answers.answer_requests", once)
    call = ("--artifact", fp32, int8_dynamic, "--task", "requests", "--tokens", 4, "--out", out)
    assert command("jaxgpt-bench", "evaluate", *call)[0] == 130
    found = json.loads(out.read_text(encoding="utf-8"))
    assert ([row["kind"] for row in found["answers"]], found["unfinished"]) == (["fp32"], ["answers"])
    with pytest.raises(UserError, match="not finished: answers is missing"):
        pages_of_answers(out.parent)


def test_bad_input(command: Command, tmp_path: Path, fp32: Path, data: Path) -> None:
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b broken")
    other = tmp_path / "other.jsonl"
    other.write_text('{"task_id": 1}\n', encoding="utf-8")
    long = tmp_path / "long.jsonl"
    problem = {"task_id": "1", "prompt": "def f(x):\n" * 500, "test": "", "entry_point": "f"}
    long.write_text(json.dumps(problem), encoding="utf-8")
    cases = {
        ("--task", "human-eval", "--problems", long): "every problem has more",
        ("--texts", 0): "--texts (0) must be at least 1",
        ("--draws", 0): "--draws (0) must be at least 1",
        ("--draws", 2, "--temperature", 0): "needs a --temperature above 0",
        ("--task", "human-eval", "--temperature", 0): "--samples 20 needs a --temperature above 0",
        ("--task", "human-eval", "--page", tmp_path / "page.md"): "--page shows answers to requests",
        ("--min-p", 2): "min_p (2.0) must lie in [0, 1]",
        ("--task", "functions"): "--data",
        ("--task", "human-eval", "--problems", broken): "can't be read as HumanEval's problems",
        ("--task", "human-eval", "--problems", other): "line 1: expected an object",
        ("--task", "nothing"): "nothing",
    }
    for arguments, part in cases.items():
        assert_one_line_error(command("jaxgpt-bench", "evaluate", "--artifact", fp32, *arguments), part)
    assert_one_line_error(
        command("jaxgpt-bench", "evaluate", "--artifact", fp32, fp32, "--task", "requests"), "named twice"
    )
