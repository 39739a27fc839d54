import ast
from pathlib import Path

import pytest

from jaxgpt.data.docstring_pairs import pairs_of_source
from jaxgpt.data.sources import ReadOptions, open_source

SOURCE = '''
import os

class Stack(list):
    """A last-in, first-out list of things.

    More words that are not the first paragraph.
    """

    def push(self, item):
        """Put an item on top of the stack."""
        self.append(item)
        return self

    def peek(self):
        """Look at the item on top of the stack."""

    def pop_all(self):
        """Remove all the items from the stack."""
        raise NotImplementedError

def one(): "A docstring on the line of its function"; return 1

@staticmethod
def area(width: int,
         height: int = 2) -> int:
    """Return the area
    of a rectangle."""

    total = width * height


    return total

def undocumented(x):
    return x + 1

def short(x):
    """Too short."""
    y = x
    return y
'''


def test_pairs_hold_first_paragraph_signature_and_source_without_docstring() -> None:
    pairs = {pair.input.partition("(")[0]: pair for pair in pairs_of_source(SOURCE)}
    assert set(pairs) == {"Stack", "push", "area"}  # stubs, one-liners and undocumented code have none
    assert pairs["Stack"].instruction == "A last-in, first-out list of things."
    assert pairs["Stack"].input == "Stack(list)"
    assert (
        pairs["push"].output
        == "```python\ndef push(self, item):\n    self.append(item)\n    return self\n```"
    )
    area = pairs["area"]
    assert area.instruction == "Return the area of a rectangle."
    assert area.input == "area(width: int, height: int=2)"
    assert area.text == f"{area.instruction} {area.input} {area.output}"
    assert area.output.startswith("```python\n@staticmethod\ndef area(width: int,\n")
    assert "\n\n\n" not in area.output


def test_every_output_of_the_interpreter_s_own_ast_module_parses() -> None:
    source = Path(ast.__file__).read_text(encoding="utf-8")
    outputs = [pair.output for pair in pairs_of_source(source)]
    assert len(outputs) > 10
    for output in outputs:
        code = output.removeprefix("```python\n").removesuffix("\n```")
        (definition,) = ast.parse(code).body
        assert isinstance(definition, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(definition) is None


def test_source_that_does_not_parse_has_no_pairs() -> None:
    assert (
        list(pairs_of_source("def broken(:\n    '''A docstring of four words.'''\n    x = 1\n    y = 2\n"))
        == []
    )


def test_a_form_feed_moves_no_line() -> None:
    function = 'def add(a, b):\n    """Return the sum of both things."""\n    c = a + b\n    return c\n'
    plain, shifted = list(pairs_of_source(function)), list(pairs_of_source("# page\n\x0c\n" + function))
    assert len(plain) == 1
    assert shifted == plain


LONG = " + ".join(["x"] * 3000)
DASH = 'f\'{x.replace("\u00a0", "-")}\''  # a no-break space, which becomes a backslash
FUNCTION = 'def f({argument}):\n    """Add many numbers up to one."""\n    {statement}\n    return {result}\n'
UNWRITTEN = (
    FUNCTION.format(argument="x", statement="y = 1", result=DASH),
    FUNCTION.format(argument="x", statement=f"raise ValueError({DASH})", result="x"),
    FUNCTION.format(argument=f"y, x={LONG}", statement="z = 1", result="x"),
    FUNCTION.format(argument="x", statement="y = 1", result=LONG),
)


@pytest.mark.parametrize("code", ["pairs", "requests"])
@pytest.mark.parametrize("function", UNWRITTEN)
def test_a_function_that_python_can_not_write_stops_nothing(tmp_path: Path, function: str, code: str) -> None:
    (tmp_path / "a.py").write_text(function)
    (tmp_path / "b.py").write_text(
        'def add_one(number):\n    """Add one to the number."""\n    y = number + 1\n    return y\n'
    )
    options = ReadOptions(code=code)  # type: ignore[arg-type]
    assert any("add_one" in each.text for each in open_source(str(tmp_path), options).documents)
