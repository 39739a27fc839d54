import ast
import builtins
import keyword
import re
from collections import Counter
from pathlib import Path

import pytest

from jaxgpt.data.documents import Document
from jaxgpt.data.requests.functions import requests_of_tree
from jaxgpt.data.requests.renamed import ONE_OF, invented_word, under_invented_word, with_renamed
from jaxgpt.data.sources import ReadOptions, open_source


def pair(request: str, code: str) -> Document:
    return Document(f"{request}\n```python\n{code}\n```", "file.py", len(request))


def renamed(request: str, code: str) -> tuple[str, str] | None:
    """Return request and code under an invented word, both with the word written as ?."""
    document = pair(request, code)
    found = under_invented_word(document)
    if found is None:
        return None
    assert found.group == document.group
    assert found.answer is not None
    word = invented_word(document.text)
    marked = [part.replace(word, "?").replace(word.capitalize(), "?") for part in
              (found.text[: found.answer], found.text[found.answer :])]  # fmt: skip
    return marked[0], marked[1].removeprefix("\n```python\n").removesuffix("\n```")


def test_an_invented_word_stands_in_the_request_and_in_all_names() -> None:
    code = "def is_prime(number):\n    primes = [2, 3]\n    return number in primes or is_prime(number - 2)"
    found = renamed("Write a function that checks whether a number is prime", code)
    assert found in [
        ("Write a function that checks whether a number is ?", code.replace("prime", "?")),
    ]


def test_plurals_follow() -> None:
    code = "def count_vowel(text):\n    return len([vowels for vowels in text])"
    assert renamed("Count the vowels", code) == ("Count the ?s", code.replace("vowel", "?"))


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        ("Find the degree", "def degree(node):\n    return node.degree"),  # the attribute tells it
        ("Find the length", "def length(text):\n    return int(f'{text} of lengths')"),  # a text does
        ("Sort the list", "def sort_list(values):\n    return list(sorted(values))"),  # sort is a verb
        ("Find the mean", "def average(values):\n    return sum(values) / len(values)"),  # no word shared
        ("Find the length", "def length(text):\n    return len(text) or 'length'"),
        ("Find the encoding", "def encoding(path, encoding):\n    return open(path, encoding=encoding)"),
        ("Find the random", "from random import choice\n\ndef random_of(values):\n    return choice(values)"),
        ("Find the point", "def point(a):\n    match a:\n        case Shape(point=3):\n            return a"),
        ("Write a function to call it", "def function(values):\n    return list(values)"),  # the template's
        ("Compute the keys from values", "def make_from(values):\n    return list(values)"),
        ("Sum it", "def sum_it(a):\n    return a + 1"),  # too short
        ("Check if a value is None", "def is_none(value):\n    return value is None"),
        ("Find the lambda", "def find_lambda(y):\n    LAMBDA = lambda: y\n    return LAMBDA"),
        ("Find the nodes", "def nodes(Node, NODE):\n    return Node + NODE"),  # two names would be one
    ],
)
def test_a_word_that_the_program_tells_otherwise_stays(request_text: str, code: str) -> None:
    assert renamed(request_text, code) is None


def test_some_requests_write_the_word_with_a_capital_and_no_name_does() -> None:
    capitals = 0
    for number in range(60):
        found = under_invented_word(
            pair("Write a function to find the kelvin", f"def kelvin(c):\n    return c + {number}")
        )
        assert found is not None
        assert found.answer is not None
        (name,) = re.findall(r"def (\w+)", found.text)
        asked = found.text[: found.answer].split()[-1]
        assert asked.lower() == name == name.lower()
        capitals += asked != name
    assert 5 < capitals < 30


def test_invented_words_are_many_follow_from_the_text_and_are_no_words_of_python() -> None:
    words = [invented_word(f"text {number}") for number in range(4000)]
    assert len(set(words)) > 3000
    assert words == [invented_word(f"text {number}") for number in range(4000)]
    assert not [word for word in words if keyword.iskeyword(word) or hasattr(builtins, word)]
    assert min(map(len, words)) >= 4
    beginnings = Counter(word[:2] for word in words)
    pairs = {first + second for first in "bcdfghjklmnprstvwz" for second in "aeiou"}
    assert pairs <= set(beginnings)  # none is likelier by far than what a request has
    assert max(beginnings.values()) < len(words) / 30
    assert invented_word(f"text 0 {words[0]}") != words[0]


def test_some_invented_words_begin_like_a_word_that_names_leave_out() -> None:
    words = [invented_word(f"text {number}") for number in range(4000)]
    for beginning in ("an", "the", "in", "for"):  # an anagram, a theorem, an integer, a format
        assert len(words) / 200 < sum(word.startswith(beginning) for word in words) < len(words) / 30


def test_the_article_follows_the_invented_word() -> None:
    articles = set()
    for number in range(60):
        found = under_invented_word(
            pair("Check if it is a triangle", f"def is_triangle(c):\n    return c + {number}")
        )
        assert found is not None
        article, word = found.text[: found.answer].split()[-2:]
        assert article == ("an" if word[0].lower() in "aeiou" else "a")
        articles.add(article)
    assert articles == {"a", "an"}


def test_about_one_pair_in_two_is_followed_by_one_under_an_invented_word() -> None:
    pairs = [pair("Find the parity", f"def parity(c):\n    return c + {number}") for number in range(100)]
    found = list(with_renamed(pairs))
    assert [each for each in found if each in pairs] == pairs
    assert 100 / ONE_OF - 20 < len(found) - 100 < 100 / ONE_OF + 20


def test_no_program_whose_request_is_held_out_comes_in_under_an_invented_word(tmp_path: Path) -> None:
    functions = [f"def is_prime(number):\n    return number % {n}" for n in range(2, 30)]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("\n\n".join(functions))
    (tmp_path / "asked.txt").write_text("Python program to check whether a number is prime\n")
    assert len(list(open_source(str(tmp_path / "code"), ReadOptions(code="requests")).documents)) > 28
    options = ReadOptions(code="requests", held_out=tmp_path / "asked.txt")
    assert not list(open_source(str(tmp_path / "code"), options).documents)


def test_a_generator_alone_stands_in_one_pair_of_brackets() -> None:
    body = "x = sum((len(a) for a in text))\n    return sum((a for a in text), f(x=(1)))"
    source = f"def count_of(text):\n    {body}"
    pairs = list(requests_of_tree(ast.parse(source)))
    assert "x = sum(len(a) for a in text)\n    return sum((a for a in text), f(x=1))" in pairs[0].output
