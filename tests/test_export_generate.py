import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_one_line_error, python
from jaxgpt_export.generation import open_session

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.tokenizer import load_tokenizer

PROMPT = "Write a function to add the total by the"


class Script:
    """An engine that wants to say the given tokens."""

    def __init__(self, tokens: list[int], vocab_size: int, block_size: int = 1000) -> None:
        self.block_size = block_size
        self._tokens, self._vocab_size, self._at = tokens, vocab_size, 0
        self.taken: list[int] = []

    def prefill(self, tokens: list[int]) -> np.ndarray:
        self.taken += tokens
        return self._next()

    def decode(self, token: int) -> np.ndarray:
        self.taken.append(token)
        return self._next()

    def _next(self) -> np.ndarray:
        logits = np.zeros(self._vocab_size, np.float32)
        logits[self._tokens[self._at]] = 1
        self._at += 1
        return logits


def say(data: Path, text: str, **options: object) -> tuple[list[str], object, Script]:
    """What `generate` shows, piece by piece, when the model wants to say a text and end."""
    tokenizer = load_tokenizer(data)
    engine = Script([*tokenizer.encode(text), tokenizer.endoftext], tokenizer.vocab_size)
    pieces: list[str] = []
    greedy = Sampling(temperature=0.0)
    settings = {"max_new_tokens": 500, "stop": [], **options}
    done = generate(engine, tokenizer, "Go:", sampling=greedy, on_text=pieces.append, **settings)
    return pieces, done, engine


def test_text_streams_whole_characters_and_ends_at_endoftext(data: Path) -> None:
    text = "print('日本 🎉')"
    pieces, done, _ = say(data, text)
    assert "".join(pieces) == done.text == text
    assert all("�" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5
    assert done.finish_reason == "endoftext"


def test_stop_string_ends_the_text_before_it(data: Path) -> None:
    pieces, done, engine = say(data, "return 1\n``` and more", stop=["```"])
    assert "".join(pieces) == done.text == "return 1\n"
    assert done.finish_reason == "stop"
    assert len(engine.taken) < 20


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_new_tokens_is_exact_and_the_last_token_is_not_fed_back(data: Path, count: int) -> None:
    _, done, engine = say(data, "one two three four five six", max_new_tokens=count)
    assert len(done.tokens) == count
    assert done.finish_reason == "length"
    prompt = load_tokenizer(data).encode("Go:")
    assert engine.taken == prompt + done.tokens[:-1]


def test_context_that_fills_up_ends_with_its_reason(data: Path) -> None:
    tokenizer = load_tokenizer(data)
    prompt = tokenizer.encode("Go:")
    engine = Script([5] * 100, tokenizer.vocab_size, block_size=len(prompt) + 3)
    done = generate(engine, tokenizer, "Go:", 50, Sampling(temperature=0.0))
    assert done.finish_reason == "context"
    assert len(engine.taken) == engine.block_size
    assert len(done.tokens) == 4


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static"])
def test_every_artifact_generates_the_run_s_greedy_text(
    command: Command, run: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 0, "--json")
    flax = json.loads(command("jaxgpt", "sample", "--run", run, *arguments)[1])
    folder = request.getfixturevalue(kind)
    ours = json.loads(command("jaxgpt-export", "generate", "--artifact", folder, *arguments)[1])
    if kind == "fp32":
        assert ours["tokens"] == flax["tokens"]
    assert ours["tokens"][0] == flax["tokens"][0]
    assert ours["tokens_per_s"] > 0


def test_same_seed_draws_alike_from_jax_and_pytorch(command: Command, run: Path, fp32: Path) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 30, "--seed", 5, "--json")
    flax = json.loads(command("jaxgpt", "sample", "--run", run, *arguments)[1])
    ours = json.loads(command("jaxgpt-export", "generate", "--artifact", fp32, *arguments)[1])
    assert ours["text"] == flax["text"]


def test_text_goes_to_stdout_and_the_rest_to_stderr(command: Command, int8_dynamic: Path) -> None:
    arguments = ("--artifact", int8_dynamic, "--prompt", PROMPT, "--max-new-tokens", 8)
    code, out, err = command("jaxgpt-export", "generate", *arguments)
    text = json.loads(command("jaxgpt-export", "generate", *arguments, "--json")[1])["text"]
    assert code == 0
    assert out == text + "\n"
    assert "tokens/s" in err


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--prompt", "xyz " * 300), "context holds 64"),
        (("--max-new-tokens", 0), "max_new_tokens (0)"),
        (("--temperature", -1), "temperature (-1.0)"),
        (("--top-p", 2), "top_p (2.0)"),
        (("--threads", -2), "threads (-2)"),
        (("--prompt", "a", "--prompts", "no.jsonl"), "--prompt and --prompts are both given"),
        (("--prompts", "no.jsonl", "--draft-tokens", 4), "--draft-tokens is for --prompt"),
        (("--engine", "torch", "--draft-tokens", 4), "--draft-tokens is for the native engine"),
        (("--engine", "torch", "--kv-cache", "int8"), "kv_cache int8 is the native engine's"),
        (("--batch", 2), "--batch is of the prompts of a file"),
    ],
)
def test_bad_requests_are_one_line(command: Command, fp32: Path, more: tuple[object, ...], part: str) -> None:
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", fp32, *more), part)


def test_a_cache_of_the_engine_is_refused_where_that_does_not_run(
    command: Command, int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_session, "unsupported_reason", lambda artifact: "it was not built")
    call = ("jaxgpt-export", "generate", "--artifact", int8_dynamic, "--prompt", "a", "--kv-cache", "int8")
    assert_one_line_error(command(*call), "kv_cache int8 is the native engine's", "because it was not built")


def test_folder_that_is_no_artifact_is_one_line(command: Command, run: Path, tmp_path: Path) -> None:
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", tmp_path / "x"), "is missing")
    assert_one_line_error(command("jaxgpt-export", "generate", "--artifact", run), "model_type")


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
"""


def test_deployment_runs_without_jax(int8_dynamic: Path) -> None:
    """Every module of jaxgpt_export but flax_run, and a token, where JAX can't be imported."""
    code = (
        BLOCK.format(blocked={"jax", "jaxlib", "flax", "optax", "orbax"})
        + f"""
import importlib, pkgutil, jaxgpt_export
for module in pkgutil.walk_packages(jaxgpt_export.__path__, "jaxgpt_export."):
    not_python = module.name == "jaxgpt_export.native.libengine"  # the engine, by its .so
    if ".flax_run" not in module.name and module.name != "jaxgpt_export.__main__" and not not_python:
        importlib.import_module(module.name)
from jaxgpt_export.cli import main
code = main(["generate", "--artifact", {str(int8_dynamic)!r}, "--max-new-tokens", "1"])
assert code == 0 and "jax" not in sys.modules
assert main(["verify", "--artifact", {str(int8_dynamic)!r}]) == 0
"""
    )
    arguments, environment = python(code)
    subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)


def test_training_never_imports_pytorch(data: Path) -> None:
    """Every module of jaxgpt where torch, jaxgpt_export and jaxgpt_bench can't be imported."""
    code = (
        BLOCK.format(blocked={"torch", "jaxgpt_export", "jaxgpt_bench", "transformers"})
        + """
import importlib, pkgutil, jaxgpt
for module in pkgutil.walk_packages(jaxgpt.__path__, "jaxgpt."):
    if module.name != "jaxgpt.__main__":
        importlib.import_module(module.name)
"""
    )
    arguments, environment = python(code)
    subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)


def test_shared_modules_need_neither_jax_nor_pytorch(data: Path) -> None:
    heavy = {"jax", "jaxlib", "flax", "torch", "datasets", "tokenizers"}
    code = (
        BLOCK.format(blocked=heavy)
        + f"""
import importlib, pkgutil, jaxgpt.shared, jaxgpt.generation, jaxgpt.shared.dataset
from pathlib import Path
for room in (jaxgpt.shared, jaxgpt.generation):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
jaxgpt.shared.dataset.open_dataset(Path({str(data)!r}))
"""
    )
    arguments, environment = python(code)
    subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)


def test_python_dash_m_is_the_console_command() -> None:
    root = Path(__file__).resolve().parent.parent
    for package in ("jaxgpt", "jaxgpt_export", "jaxgpt_bench"):
        done = subprocess.run(
            [sys.executable, "-m", package, "--help"],
            cwd=root,
            env=os.environ,
            check=True,
            capture_output=True,
        )
        assert b"usage: jaxgpt" in done.stderr


def test_a_prompt_of_dash_is_read_from_stdin(int8_dynamic: Path, run: Path, command: Command) -> None:
    arguments = ("--max-new-tokens", "8")
    folder = ("--artifact", str(int8_dynamic))
    expected = command("jaxgpt-export", "generate", *folder, "--prompt", f"{PROMPT}\n", *arguments)[1]
    code = "import sys; from jaxgpt_export.cli import main; sys.exit(main(sys.argv[1:]))"
    line, environment = python(code)
    line += ["generate", *folder, "--prompt", "-", *arguments]
    given = f"{PROMPT}\n".encode()
    done = subprocess.run(line, env=environment, input=given, capture_output=True, check=True)
    assert done.stdout.decode() == expected
    bad = subprocess.run(line, env=environment, input=b"\xff\xfe", capture_output=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith(b"error: the prompt on stdin is not UTF-8")
    for closed in ("<&-", ">&-"):
        shell = f"{shlex.join(line)} {closed}"
        done = subprocess.run(shell, shell=True, env=environment, capture_output=True, check=False)
        assert done.returncode == 2
        assert re.fullmatch(rb"error: .* closed.*\n", done.stderr), done.stderr


def test_without_a_prompt_and_a_terminal_a_new_document_is_begun(
    command: Command, int8_dynamic: Path
) -> None:
    arguments = ("--artifact", int8_dynamic, "--max-new-tokens", 8)
    _, out, _ = command("jaxgpt-export", "generate", *arguments, "--prompt", "")
    assert command("jaxgpt-export", "generate", *arguments)[:2] == (0, out)


class Terminal:
    """A process on a pseudo-terminal, as a person has it."""

    def __init__(self, line: list[str], environment: dict[str, str]) -> None:
        self._fd, end = pty.openpty()
        self._process = subprocess.Popen(line, env=environment, stdin=end, stdout=end, stderr=end)
        os.close(end)
        self._unread = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until a text is shown; return what was shown since the last call, up to it."""
        until = time.monotonic() + seconds
        while text not in self._unread:
            ready, _, _ = select.select([self._fd], [], [], max(until - time.monotonic(), 0))
            assert ready, f"{text!r} was not shown: {self._unread!r}"
            try:
                self._unread += os.read(self._fd, 4096).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"{text!r} was not shown before the end: {self._unread!r}") from None
        shown, found, self._unread = self._unread.partition(text)
        return shown + found

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def exit_code(self) -> int:
        code = self._process.wait(60)
        os.close(self._fd)
        return code


def test_on_a_terminal_it_asks_again_and_again_until_ctrl_d(int8_dynamic: Path, command: Command) -> None:
    folder, more = ("--artifact", str(int8_dynamic)), ("--max-new-tokens", "6", "--temperature", "0")
    expected = command("jaxgpt-export", "generate", *folder, *more, "--prompt", "total")[1].splitlines()[0]
    line, environment = python("import sys; from jaxgpt_export.cli import main; sys.exit(main(sys.argv[1:]))")
    terminal = Terminal([*line, "generate", *folder, *more], {**environment, "TERM": "dumb"})
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    for _ in range(2):  # the model stays loaded
        terminal.type("total\n")
        assert expected in terminal.wait_for("6 tokens (length)")
        terminal.wait_for("> ")
    terminal.type("xyz " * 200 + "\n")
    terminal.wait_for("context holds 64")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
