import dataclasses
import importlib
import importlib.metadata
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error, python, rows, write_jsonl

from jaxgpt.shared import console
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.console import Result
from jaxgpt.training.options import DeviceOptions


@pytest.mark.parametrize("program", ["jaxgpt", "jaxgpt-export", "jaxgpt-bench"])
def test_unknown_command_is_one_line_with_the_nearest(command: Command, program: str) -> None:
    nearest = {"jaxgpt": "prepare", "jaxgpt-export": "convert", "jaxgpt-bench": "quality"}[program]
    assert_one_line_error(command(program, nearest[:-1]), nearest, "did you mean")


def test_unknown_option_is_one_line_with_the_nearest(command: Command, tmp_path: Path) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", tmp_path, "--out", tmp_path, "--max-step", 3)
    assert_one_line_error(result, "--max-step", "did you mean --max-steps")


def test_missing_option_is_one_line(command: Command) -> None:
    assert_one_line_error(command("jaxgpt", "prepare", "--source", "stdlib"), "--out")


def test_value_of_the_wrong_type_is_one_line(command: Command, tmp_path: Path) -> None:
    result = command("jaxgpt", "train", "tiny", "--data", tmp_path, "--out", tmp_path, "--max-steps", "many")
    assert_one_line_error(result, "--max-steps", "many")


def test_unknown_method_is_one_line_with_the_choices(command: Command, tmp_path: Path) -> None:
    arguments = ("--artifact", tmp_path, "--method", "dinamic", "--out", tmp_path / "new")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "dinamic", "dynamic")


def test_json_prints_exactly_one_document_on_stdout(command: Command, run: Path) -> None:
    code, out, err = command("jaxgpt", "evaluate", "--run", run, "--json")
    assert code == 0
    assert out.count("\n") == 1
    figures = json.loads(out)
    assert f"{figures['val_loss']:.4f}" in err


def test_no_json_means_nothing_on_stdout(command: Command, run: Path) -> None:
    code, out, _ = command("jaxgpt", "evaluate", "--run", run)
    assert code == 0
    assert out == ""


def test_help_goes_out_with_code_0_and_no_command_with_code_2(command: Command) -> None:
    assert command("jaxgpt", "--help")[0] == 0
    assert command("jaxgpt")[0] == 2


def test_text_with_colons_is_printed_as_it_is(command: Command, tmp_path: Path) -> None:
    arguments = ("--source", "stdlib", "--tokenizer", "bpe:100:", "--out", tmp_path / "d")
    assert_one_line_error(command("jaxgpt", "prepare", *arguments), "bpe:100:")


def test_version_is_the_package_s(command: Command) -> None:
    code, _, err = command("jaxgpt", "--version")
    assert code == 0
    assert err.strip() == f"jaxgpt {importlib.metadata.version('jaxgpt')}"


@pytest.mark.parametrize("out", ["/dev/null/x", "x" * 300, "nowhere/../d\0"])
def test_an_impossible_path_is_one_line(command: Command, tmp_path: Path, out: str) -> None:
    if "\0" in out:
        out = str(tmp_path / "f" / "d")
        (tmp_path / "f").write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", rows(40))
    target = out if out.startswith("/") else tmp_path / out
    arguments = ("--source", source, "--tokenizer", "bpe:300", "--val-fraction", 0.3, "--out", target)
    code, stdout, err = command("jaxgpt", "prepare", *arguments)
    assert code == 2, err
    assert "Traceback" not in err
    assert stdout == ""


def test_what_is_not_installed_is_named_with_its_extra() -> None:
    block = "import sys; sys.modules['jax'] = None"
    argv = ["train", "tiny", "--data", "DATA", "--out", "RUN"]
    command, environment = python(f"{block}\nfrom jaxgpt.cli import main\nsys.exit(main({argv!r}))")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert_one_line_error((done.returncode, done.stdout, done.stderr), "needs jax", "[train]")


def test_a_reader_that_leaves_is_no_traceback(fp32: Path) -> None:
    argv = ["generate", "--artifact", str(fp32), "--max-new-tokens", "40"]
    command, environment = python(f"import sys; from jaxgpt_export.cli import main; sys.exit(main({argv!r}))")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_a_log_that_can_not_be_written_ends_nothing() -> None:
    code = (
        "import sys\nfrom jaxgpt.shared.console import say\nfrom jaxgpt.shared.entry import leave\n"
        "for _ in range(3): say('a line')\nprint('went on', flush=True)\nleave('the end', 7)"
    )
    line, environment = python(code)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert (done.stdout, done.returncode) == ("went on\n", 7)
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.close()
    assert (process.stdout.read(), process.wait()) == ("went on\n", 7)


PROGRAMS = {"jaxgpt": "jaxgpt.cli", "jaxgpt-export": "jaxgpt_export.cli", "jaxgpt-bench": "jaxgpt_bench.cli"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_a_program_says_of_each_command_what_the_command_says_of_itself(
    command: Command, program: str
) -> None:
    code, _, err = command(program, "--help")
    assert code == 0
    assert max(map(len, err.splitlines())) <= 80
    words = " ".join(err.split())
    for name, entry in importlib.import_module(PROGRAMS[program]).COMMANDS.items():
        module_name, options_name, _ = entry.target.split(":")
        options = getattr(importlib.import_module(module_name), options_name)
        assert entry.about == options.__doc__.partition("\n")[0]
        assert f" {name} {entry.about}" in words.replace("micro- batch", "micro-batch")
    assert f"{program} --version" in words
    assert f"{program} --tyro-write-completion bash FILE" in words


@pytest.mark.parametrize("program", PROGRAMS)
def test_bash_completes_commands_and_flags_by_the_script_that_a_program_writes(
    command: Command, program: str, tmp_path: Path
) -> None:
    script = tmp_path / "completion"
    assert command(program, "--tyro-write-completion", "bash", script) == (0, "", "")

    def completed(*words: str) -> set[str]:
        typed = " ".join(map(shlex.quote, (program, *words)))
        call = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _tyro_{program.replace('-', '_')}"
        line = f'source {script}; {call}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    commands = importlib.import_module(PROGRAMS[program]).COMMANDS
    assert set(commands) <= completed("")
    first = {"jaxgpt": "train", "jaxgpt-export": "quantize", "jaxgpt-bench": "generate"}[program]
    assert first in completed(first[:3])
    flag = {"jaxgpt": "--beta1", "jaxgpt-export": "--method", "jaxgpt-bench": "--rounds"}[program]
    assert flag in completed(first, flag[:4])
    if program == "jaxgpt":
        assert completed("train", "tiny", "--beta") == {"--beta1", "--beta2"}
        switches = {each for kind in (ModelConfig, TrainConfig) for each in dataclasses.fields(kind)}
        named = {f"--no-{each.name.replace('_', '-')}" for each in switches if each.type is bool}
        assert {"--no-tied", "--no-qat", "--no-remat"} < named
        assert completed("train", "tiny", "--no-") == named
        assert completed("train", "--precision", "") == {"fp32", "bf16", "fp16"}


def test_a_completion_is_printed_for_each_shell_as_it_is_written(command: Command, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = command("jaxgpt", "--tyro-print-completion", shell)
        assert code == 0
        assert "grad-accum-steps" in out
        command("jaxgpt", "--tyro-write-completion", shell, tmp_path / shell)
        assert (tmp_path / shell).read_text() == out


@pytest.mark.parametrize(
    "arguments",
    [("--tyro-print-completion",), ("--tyro-print-completion", "csh"), ("--tyro-write-completion", "bash")],
)
def test_a_completion_for_no_shell_or_no_file_is_one_line(
    command: Command, arguments: tuple[str, ...]
) -> None:
    assert_one_line_error(command("jaxgpt", *arguments), arguments[0], "bash, zsh, fish")


# Commands whose options stand in a file that computes with arrays: their help takes 0.1 s more.
WITH_NUMPY = {
    "jaxgpt": {"prepare", "sample"},
    "jaxgpt-export": {"convert", "quantize", "generate", "gguf"},
    "jaxgpt-bench": {"agreement", "recipe"},
}
HEAVY = [
    "jax",
    "flax",
    "optax",
    "orbax",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "matplotlib",
    "pandas",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_most_commands_imports_nothing_that_computes(program: str) -> None:
    code = f"""
import contextlib, io, sys
from {PROGRAMS[program]} import COMMANDS, main
main(["--help"])
assert not {{"tyro", "numpy"}} & set(sys.modules), "help of the program"
for name in COMMANDS:
    if name not in {WITH_NUMPY[program]!r}:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            main([name, "--help"])
        assert "usage: {program} " + name in shown.getvalue()
        found = [module for module in ["numpy", "jaxtyping", *{HEAVY!r}] if module in sys.modules]
        assert not found, (name, found)
for name in COMMANDS:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([name, "--help"])
    assert not [module for module in {HEAVY!r} if module in sys.modules], name
"""
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def documented() -> dict[str, type]:
    """Return the classes whose docstrings help shows, by their names."""
    named: list[type] = [ModelConfig, TrainConfig, DeviceOptions]
    for module in PROGRAMS.values():
        for entry in importlib.import_module(module).COMMANDS.values():
            module_name, options_name, _ = entry.target.split(":")
            named += getattr(importlib.import_module(module_name), options_name).__mro__
    return {cls.__name__: cls for cls in named if dataclasses.is_dataclass(cls)}


@pytest.mark.parametrize("name", documented())
def test_no_line_of_an_option_s_words_begins_with_what_tyro_takes_for_a_new_paragraph(name: str) -> None:
    lines = documented()[name].__doc__.splitlines()
    assert [line for line in lines if re.match(r" {8}[^A-Za-z\s]", line)] == []


@dataclasses.dataclass(frozen=True)
class PathOptions:
    """Take a path.

    Attributes:
      out: a path.
      json: print a document.
    """

    out: Path
    json: bool = False


def write_letters(options: PathOptions) -> Result:
    """What a model may write."""
    sys.stdout.write("gr\u00f6\u00dfe \u65e5 \U0001f389\n")
    return Result({})


def run_letters(*arguments: str) -> int:
    return console.run(
        "p",
        "a program",
        {"x": console.Command("test_jaxgpt_console:PathOptions:write_letters", "x")},
        arguments,
    )


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", b"gr??e ? ?\n"), ("cp1252", b"gr\xf6\xdfe ? ?\n")]
)
def test_letters_that_stdout_can_not_hold_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: bytes
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert run_letters("x", "--out", "y") == 0
    assert raw.getvalue() == written


@pytest.mark.parametrize("out", ["gs://bucket/run", "s3:/bucket", "https://a.b/c"])
def test_an_address_is_no_path(capfd: pytest.CaptureFixture[str], out: str) -> None:
    assert run_letters("x", "--out", out) == 2
    address = out.replace(":/b", "://b")
    expected = f"error: --out {address} is an address, expected a path of the local file system"
    assert capfd.readouterr().err.startswith(expected)
    assert run_letters("x", "--out", "runs/gs:none") == 0


def test_a_platform_that_jax_has_not_is_one_line_and_settings_of_other_programs_are_left_out() -> None:
    code = (
        "from jaxgpt.shared.machine import leave_out_settings, missing_platform\n"
        "leave_out_settings()\n"
        "import jax\n"
        "assert (jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion) == (False, 'standard')\n"
        "try: jax.devices()\n"
        "except Exception as error: print(missing_platform(error), missing_platform(ValueError()))"
    )
    line, environment = python(code)
    for platform in ("tpu", "cuda"):
        others = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_PLATFORMS": platform}
        done = subprocess.run(line, env={**environment, **others}, capture_output=True, text=True)
        assert done.stdout.startswith(f"JAX finds no device for JAX_PLATFORMS='{platform}'"), done.stderr[
            -2000:
        ]
        assert done.stdout.endswith("(for GPUs the extra cuda) None\n")
