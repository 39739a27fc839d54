import ast
import itertools
import json
import re
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error, rows, write_jsonl

from jaxgpt.data.requests.functions import (
    MAX_OTHER_CHARACTERS,
    MAX_PROGRAM_CHARACTERS,
    OTHER_REQUESTS,
    PLAIN_REQUESTS,
    requests_of_tree,
)
from jaxgpt.data.requests.wording import (
    normalized_request,
    request_of_name,
    tasks_of_sentence,
    third_person,
)
from jaxgpt.data.sources import ReadOptions, open_source
from jaxgpt.data.work.plan import _is_relative
from jaxgpt.shared.dataset import open_dataset
from jaxgpt.shared.tokenizer import load_tokenizer

SOURCE = '''
import math
import numpy as np
from collections import Counter as Counted

@decorated
def circle_area(radius: float) -> float:
    """Return the area of a circle.

    :param radius: of it.
    """
    # A comment.
    total: float = math.pi * radius ** 2
    return total

def _is_even(number):
    """Return True if a number is even, else False."""
    return number % 2 == 0 or _is_even(number - 2)

def means(values):
    """Compute the means of some arrays."""
    return [np.mean(value) for value in values]

def stub(x):
    """Return nothing at all of it."""
    raise NotImplementedError

class Tools:
    def method(self):
        """Return the method of an object."""
        return self.x

    @staticmethod
    def most_common(words):
        return Counted(words).most_common(1)
'''


def programs(source: str) -> dict[str, set[str]]:
    """Return the requests of each program."""
    found: dict[str, set[str]] = {}
    for pair in requests_of_tree(ast.parse(source)):
        found.setdefault(pair.output, set()).add(pair.instruction)
    return found


def test_a_program_is_the_bare_function_behind_the_imports_that_it_uses() -> None:
    area, even, means, common = programs(SOURCE)
    assert area == (
        "```python\nimport math\n\ndef circle_area(radius):\n"
        "    total = math.pi * radius ** 2\n    return total\n```"
    )
    assert even == ("```python\ndef is_even(number):\n    return number % 2 == 0 or is_even(number - 2)\n```")
    assert means.startswith("```python\ndef means(")  # numpy is not of the standard library
    assert common.startswith(
        "```python\nfrom collections import Counter as Counted\n\ndef most_common(words)"
    )


def test_a_function_that_needs_python_alone_has_more_requests() -> None:
    area, even, means, _ = programs(SOURCE).values()
    assert 1 < len(area) <= PLAIN_REQUESTS
    assert 1 < len(even) <= PLAIN_REQUESTS
    assert len(means) == 1
    assert all("area of a circle" in request or "circle area" in request for request in area)
    assert all("number is even" in request for request in even)


def test_the_same_source_gives_the_same_requests() -> None:
    assert programs(SOURCE) == programs(SOURCE)


def test_what_is_long_or_repeats_itself_is_no_program() -> None:
    line = "    x = number + {}\n"
    long = "".join(f"    some_name_{i} = number ** {i}\n" for i in range(MAX_PROGRAM_CHARACTERS // 20))
    for body in (line.format(1) * 9, long):
        assert not programs(f'def add_number(number):\n    """Add one to a number."""\n{body}    return x\n')


def test_a_line_that_opens_many_brackets_is_in_no_program() -> None:
    source = "def add_numbers(numbers):\n    x = {}\n    return sum(numbers) + x[len(numbers)]\n"
    assert programs(source.format("max(len(numbers), abs(numbers))"))
    assert not programs(source.format("max(len(numbers), abs(numbers[0]))"))


def test_a_program_that_needs_other_packages_is_shorter() -> None:
    body = "".join(f"    part_{i} = numbers[{i}] ** {i}\n" for i in range(MAX_OTHER_CHARACTERS // 25))
    source = 'def add_numbers(numbers):\n    """Add the numbers of a list."""\n{}    return {}\n'
    assert MAX_OTHER_CHARACTERS < len(body) < MAX_PROGRAM_CHARACTERS - 60
    assert programs(source.format(body, "sum(numbers)"))
    assert not programs(source.format(body, "np.sum(numbers)"))
    assert programs(source.format("", "np.sum(numbers)"))


@pytest.mark.parametrize("module", ["numpy", "numpy.linalg", "."])
def test_what_a_function_imports_inside_is_needed_too(module: str) -> None:
    source = "def add_numbers(numbers):\n    from {} import add\n    return add(numbers)\n"
    assert [len(each) for each in programs(source.format(module)).values()] == [OTHER_REQUESTS]
    (asked,) = programs(source.format("operator")).values()
    assert OTHER_REQUESTS < len(asked) <= PLAIN_REQUESTS


def test_a_private_function_that_calls_the_public_one_is_no_program() -> None:
    source = "def {}circle_area(radius):\n    x = circle_area(radius)\n    return x\n"
    assert not programs(source.format("_"))
    assert programs(source.format(""))


def test_a_name_that_a_function_declares_global_is_needed_too() -> None:
    source = "def count_frames(number):\n    {}\n    frame = number\n    return frame\n"
    assert [len(each) for each in programs(source.format("global frame")).values()] == [OTHER_REQUESTS]
    assert [len(each) for each in programs(source.format("other = 1")).values()] != [OTHER_REQUESTS]


@pytest.mark.parametrize(
    ("sentence", "task"),
    [
        ("Returns True if the string is empty, otherwise False.", "check if the string is empty"),
        ("Check whether a graph has a cycle", "check if a graph has a cycle"),
        ("Return the number of leaves in a tree", "count the leaves in a tree"),
        ("Reverses the order of `items`.", "reverse the order of items"),
    ],
)
def test_a_sentence_says_what_is_asked_for(sentence: str, task: str) -> None:
    assert (task, third_person(task)) in tasks_of_sentence(sentence)


@pytest.mark.parametrize("sentence", ["The mean of some data.", "See also the other function", "Return x"])
def test_a_sentence_that_begins_with_no_verb_or_is_short_asks_for_nothing(sentence: str) -> None:
    assert tasks_of_sentence(sentence) == []


@pytest.mark.parametrize(
    ("name", "arguments", "task"),
    [
        ("is_prime", ["number"], "check if a number is prime"),
        ("removeDuplicates", [], "remove duplicates"),
        ("celsius_to_kelvin", ["c"], "convert celsius to kelvin"),
        ("sort", ["items"], "sort items"),
    ],
)
def test_a_name_says_what_is_asked_for(name: str, arguments: list[str], task: str) -> None:
    assert task in [base for base, _ in request_of_name(name, arguments)]


def test_verbs_in_the_third_person() -> None:
    forms = ["finds it", "copies it", "checks", "pushes it", "displays it"]
    assert [third_person(base) for base in ["find it", "copy it", "check", "push it", "display it"]] == forms


def test_requests_are_alike_whatever_stands_around_the_task() -> None:
    alike = [
        "Python program to check whether a number is prime",
        "Write a function that checks if the given number is prime.",
        "Return True if number is prime",
    ]
    assert len({normalized_request(each) for each in alike}) == 1
    others = ["Write a function to find the next prime number", "Check whether a number is odd"]
    assert not {normalized_request(each) for each in others} & {normalized_request(alike[0])}


def test_held_out_requests_are_in_no_split_and_counted(command: Command, tmp_path: Path) -> None:
    made = [
        {"question": f"Write a function to add {i} to a list", "answer": f"def add_{i}(a):\n    a += [{i}]"}
        for i in range(40)
    ]
    asked = {"question": "Python program to sum a list", "answer": "def total(a):\n    return sum(a)"}
    write_jsonl(tmp_path / "rows.jsonl", [*made, asked])
    (tmp_path / "asked.txt").write_text("Write a Python function that sums the list\n\n")
    done = command(
        *(
            "jaxgpt",
            "prepare",
            "--source",
            str(tmp_path / "rows.jsonl"),
            "--template",
            r"{question}\n{answer}",
        ),
        *("--tokenizer", "bpe:300", "--val-fraction", "0.3", "--out", str(tmp_path / "data")),
        *("--held-out", str(tmp_path / "asked.txt")),
    )
    code, out, err = done
    assert code == 0, err
    assert "1 pairs whose request is held out (Python program to sum a list)" in out + err
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["counts"]["held_out_pairs"] == 1
    assert manifest["counts"]["documents_read"] == len(made)
    assert manifest["reading"]["held_out"] == "asked.txt"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["has no request"]),
        ("Write a function\n", ["says nothing that a request asks for"]),
        (None, ["can't be read"]),
        ("sum a list\n", ["--held-out needs pairs", "--template"]),
    ],
)
def test_a_held_out_file_that_can_hold_nothing_out_is_one_line(
    command: Command, tmp_path: Path, content: str | None, words: list[str]
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(9))
    if content is not None:
        (tmp_path / "asked.txt").write_text(content)
    done = command(
        *("jaxgpt", "prepare", "--source", str(tmp_path / "rows.jsonl"), "--tokenizer", "bpe:300"),
        *("--out", str(tmp_path / "data"), "--held-out", str(tmp_path / "asked.txt")),
    )
    assert_one_line_error(done, *words)
    assert not (tmp_path / "data").exists()


def test_python_files_of_a_folder_and_the_standard_library_give_requests(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(SOURCE)
    options = ReadOptions(code="requests")
    documents = list(open_source(str(tmp_path), options).documents)
    for document in documents:
        assert document.answer is not None
        assert document.text[document.answer :].startswith("\n```python\n")
    assert {document.group for document in documents} == {"code.py"}
    first = next(iter(open_source("packages:stdlib,tyro", options).documents))
    assert first.group.startswith("stdlib/")


def test_a_source_of_many_packages_is_no_path_however_long_its_name() -> None:
    assert not _is_relative("packages:" + ",".join(["numpy"] * 60))


def test_requests_of_one_program_do_not_stand_side_by_side(command: Command, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for file in ("a", "b", "c", "d", "e", "f", "g", "h"):
        functions = [
            f"def {file}{n}_sum(values):\n    return sum(values) + len('{n}')"
            for n in ("ab", "cd", "ef", "gh", "ij")
        ]
        (tmp_path / "code" / f"{file}.py").write_text("\n\n".join(functions))
    asked = ("--code", "requests", "--tokenizer", "bpe:300", "--val-fraction", "0.3")
    folders = [tmp_path / name for name in ("data", "again")]
    for folder in folders:
        code, _, err = command(
            "jaxgpt", "prepare", "--source", str(tmp_path / "code"), *asked, "--out", folder
        )
        assert code == 0, err
    dataset = open_dataset(folders[0])
    assert open_dataset(folders[1]).sha256 == dataset.sha256
    names = re.findall(r"def (\w+)", load_tokenizer(folders[0]).decode(dataset.train[:].tolist()))
    assert len(set(names)) > 10
    assert 2 * len(set(names)) < len(names) <= PLAIN_REQUESTS * len(set(names))
    beside = sum(a == b for a, b in itertools.pairwise(names))
    assert beside < len(names) / 6  # as hashes have it; in the order of the source five of six stand so


def test_a_sentence_that_does_not_tell_the_name_is_not_asked() -> None:
    source = 'def norm_path(path):\n    """Resolve equivalent files equivalently."""\n    return path.lower()'
    (requests,) = programs(source).values()
    assert all("norm path" in request for request in requests)
    assert not programs("def test_all(values):\n    return all(values)")


def test_rows_of_a_table_that_share_an_answer_do_not_leave_together(tmp_path: Path) -> None:
    asked = ["Is alpha big?", "What is the capital of France?", "Is beta big?"]
    write_jsonl(tmp_path / "a.jsonl", [{"q": each, "a": "Yes"} for each in asked])
    (tmp_path / "held.txt").write_text("What is the capital of France?\n")
    options = ReadOptions(template=r"{q}\n{a}", held_out=tmp_path / "held.txt")
    source = open_source(str(tmp_path / "a.jsonl"), options)
    assert [document.text for document in source.documents] == ["Is alpha big?\nYes", "Is beta big?\nYes"]
