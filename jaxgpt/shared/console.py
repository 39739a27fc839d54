"""The command-line glue of the three console commands.

A command is a frozen dataclass (its options; the docstring is its help text) and a function that takes
it and returns a `Result`. Progress and prose go to stderr. With --json, exactly one JSON document goes
to stdout, as its last line. Exit code 0: done; 1: a check failed; 2: bad usage or bad input.
"""

import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro
from rich.console import Console

from jaxgpt.shared.errors import UserError, nearest

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
if not stderr.is_terminal:
    stderr.width = 120  # tables in a log keep their columns

# What a command may lack, and the extra of pyproject.toml that brings it.
EXTRA_OF = {
    "jax": "train", "flax": "train", "optax": "train", "orbax": "train", "tensorboardX": "train",
    "datasets": "train", "huggingface_hub": "train",
    "tokenizers": "hf",
    "torch": "export",
    "gguf": "gguf",
    "jinja2": "bench", "matplotlib": "bench", "transformers": "bench",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command leaves.

    Attributes:
      figures: every figure that the prose shows; printed with --json.
      passed: False when a check failed (exit code 1).
    """

    figures: Mapping[str, Any]
    passed: bool = True


def say(text: str) -> None:
    """Print a line of prose on stderr."""
    stderr.print(text, markup=False, emoji=False)


def run(prog: str, about: str, commands: Mapping[str, str], argv: Sequence[str] | None) -> int:
    """Run one console command.

    Args:
      prog: its name, such as "jaxgpt".
      about: one line for --help.
      commands: sub-command -> "module:OptionsClass:function"; only the chosen module is imported.
      argv: arguments without the program's name; None takes sys.argv.

    Returns:
      The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            usage = f"usage: {prog} COMMAND [options]\n\n{about}\n\ncommands: {', '.join(commands)}"
            say(f"{usage}\n\n{prog} COMMAND --help tells a command's options.")
            return 0 if arguments else 2
        if arguments[0] == "--version":
            say(f"{prog} {importlib.metadata.version('jaxgpt')}")
            return 0
        name, *rest = arguments
        if name not in commands:
            raise UserError(f"{prog} has no command {name!r}; {nearest(name, commands)}")
        module_name, options_name, function_name = commands[name].split(":")
        module = importlib.import_module(module_name)
        options = parse(getattr(module, options_name), f"{prog} {name}", rest)
        function: Callable[[Any], Result] = getattr(module, function_name)
        result = function(options)
        if options.json:
            sys.stdout.write(json.dumps(result.figures, allow_nan=False) + "\n")
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        extra = EXTRA_OF[package]
        say(
            f"error: this command needs {package}, which is not installed; "
            f"pip install -c constraints.txt -e '.[{extra}]'"
        )
        return 2
    except OSError as error:
        where = error.filename or "while writing"
        if error.errno == errno.ENOSPC:
            say(f"error: no space left on the device ({where}); free some and run again")
        else:
            reason = " ".join((error.strerror or str(error)).split())
            say(f"error: {where}: {reason}; check the path and its permissions")
        return 2
    except KeyboardInterrupt:
        say("interrupted; nothing half-written is left under a final name")
        return 130
    return 0 if result.passed else 1


def parse(options: type[Any], prog: str, arguments: Sequence[str]) -> Any:
    """Read command-line arguments into an options dataclass.

    Flags that had another name once are named by the class attribute RENAMED, old name -> name now: they are
    taken, and help shows one name.

    Raises:
      UserError: an unknown or missing flag, or a value of the wrong type; one line.
      SystemExit: after --help.
    """
    arguments = [_current_flag(argument, getattr(options, "RENAMED", {})) for argument in arguments]
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(options)]
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*flags, "--help", "--"):
            raise UserError(
                f"{prog} has no option {flag!r}; {nearest(flag, flags)} "
                "(a value that begins with dashes is given as --option=VALUE)"
            )
    captured = io.StringIO()
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(captured):
            value, unknown = tyro.cli(
                options, prog=prog, args=list(arguments), return_unknown_args=True, config=config
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(captured.getvalue())}; {prog} --help tells the options") from None
    if unknown:
        raise UserError(f"{prog} can't use {unknown[0]!r}; {prog} --help tells the options")
    return value


def _current_flag(argument: str, renamed: Mapping[str, str]) -> str:
    """Return an argument with a flag's old name replaced by its name now."""
    flag, equals, value = argument.partition("=")
    return f"{renamed.get(flag.replace('_', '-'), flag)}{equals}{value}"


def _one_line(box: str) -> str:
    """Turn tyro's framed message into one line: its first paragraph, without the frame."""
    lines = [re.sub(r"[─━╭╮╰╯│┃]", " ", line).strip() for line in box.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if not line or line.startswith(("For full helptext", "Argument helptext")):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split()) or "the options do not fit"


def cpu_seconds() -> float:
    """CPU time of this process and its finished children so far, user + system, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
