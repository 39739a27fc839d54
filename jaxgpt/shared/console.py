"""The command-line glue of the three console commands.

A command is a frozen dataclass (its options; the docstring is its help text) and a function that takes
it and returns a `Result`. Progress and prose go to stderr. With --json, exactly one JSON document goes
to stdout, as its last line. Exit code 0: done; 1: a check failed; 2: bad usage or bad input; 75: not done,
and the same command goes on; 130: Ctrl-C.

Options that begin with a preset have a class method `of_preset`, which returns their constructor with the
preset's values as defaults. Their settings lie in dataclasses inside, a group in --help each; `given`
takes the names of the settings that the command line gives.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import operator
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

from rich.console import Console

from jaxgpt.shared.entry import INTERRUPTED, NOTHING_HALF_WRITTEN, Command
from jaxgpt.shared.errors import UserError, nearest, require_local_paths, system_error_line
from jaxgpt.shared.machine import leave_out_settings, missing_platform


class _Stderr(Console):
    """A console that goes quiet where its reader has left, in place of ending the program."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


stderr = _Stderr(stderr=True, highlight=False, soft_wrap=True)
if not stderr.is_terminal:
    stderr.width = 160  # tables in a log keep their columns

# What a command may lack, and the extra of pyproject.toml that brings it.
EXTRA_OF = {
    "jax": "train", "flax": "train", "optax": "train", "orbax": "train", "tensorboardX": "train",
    "datasets": "train", "pyarrow": "train",
    "huggingface_hub": "hf", "tokenizers": "hf",
    "torch": "export",
    "gguf": "gguf",
    "onnx": "onnx", "onnxruntime": "onnx",
    "httptools": "serve", "prometheus_client": "serve", "starlette": "serve", "uvicorn": "serve",
    "jinja2": "bench", "matplotlib": "bench", "psutil": "bench", "transformers": "bench",
}  # fmt: skip

UNFINISHED = os.EX_TEMPFAIL


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command leaves.

    Attributes:
      figures: every figure that the prose shows; printed with --json.
      passed: False when a check failed (exit code 1).
      interrupted: Ctrl-C ended it before it was done, though in good order (exit code 130).
      unfinished: it left in good order before it was done; the same command goes on (exit code 75,
        EX_TEMPFAIL of sysexits.h).
    """

    figures: Mapping[str, Any]
    passed: bool = True
    interrupted: bool = False
    unfinished: bool = False


class _Flag(NamedTuple):
    setting: str  # name of the field
    types: tuple[Any, ...]  # of its value; of bool alone, where it takes none


def say(text: str) -> None:
    """Print a line of prose on stderr, if that can be written: a log on a full disk, say, ends nothing."""
    with contextlib.suppress(OSError):
        stderr.print(text, markup=False, emoji=False)


def run(prog: str, about: str, commands: Mapping[str, Command], argv: Sequence[str] | None) -> int:
    """Run one console command.

    Args:
      prog: its name, such as "jaxgpt".
      about: one line for --help.
      commands: sub-command -> what it is; only the chosen module is imported.
      argv: arguments without the program's name; None takes sys.argv.

    Returns:
      The exit code.
    """
    if sys.stdout is None:
        say("error: stdout is closed, and results go there; open it, or send it to /dev/null")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that not every encoding holds
    leave_out_settings()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            say(_usage(prog, about, commands))
            return 0 if arguments else 2
        if arguments[0] == "--version":
            say(f"{prog} {_version()}")
            return 0
        name, *rest = arguments
        if name.replace("_", "-") in COMPLETION:
            _complete(prog, commands, arguments)
            return 0
        if name not in commands:
            raise UserError(f"{prog} has no command {name!r}; {nearest(name, commands)}")
        options_class, function = _load(commands[name])
        options = parse(options_class, f"{prog} {name}", rest)
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
    except (ModuleNotFoundError, OSError, RuntimeError, AssertionError) as error:
        if (line := _line_for(error)) is None:
            raise
        say(f"error: {line}")
        return 2
    except KeyboardInterrupt:
        say(NOTHING_HALF_WRITTEN)
        return INTERRUPTED
    if result.interrupted:
        return INTERRUPTED
    if not result.passed:
        return 1
    return UNFINISHED if result.unfinished else 0


def _line_for(error: Exception) -> str | None:
    """Return what is said of an error that is the user's to mend; None for a fault of the program."""
    if isinstance(error, OSError):
        return system_error_line(error)
    if not isinstance(error, ModuleNotFoundError):
        return missing_platform(error)
    wanted = missing_package(error)
    return None if wanted is None else f"this command needs {wanted}"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return which package is missing and how it is installed; None for one that no extra brings."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF:
        return None
    return f"{package}, which is not installed; pip install -c constraints.txt -e '.[{EXTRA_OF[package]}]'"


def _usage(prog: str, about: str, commands: Mapping[str, Command]) -> str:
    """Return the help of a whole program, at most 80 columns wide."""
    width = max(map(len, commands)) + 4
    lines = [
        textwrap.fill(
            command.about, 80, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width
        )
        for name, command in commands.items()
    ]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [options]",
            "",
            textwrap.fill(about, 80),
            "",
            *lines,
            "",
            f"{prog} COMMAND --help tells a command's options.",
            f"{prog} --version tells the version.",
            "Commands and their options are completed by bash (zsh, fish) after:",
            f"  {prog} {COMPLETION[1]} bash FILE && source FILE",
        ]
    )


def _version() -> str:
    import importlib.metadata  # takes longer than all else that --help needs from the standard library

    return importlib.metadata.version("jaxgpt")


def _load(command: Command) -> tuple[type[Any], Callable[[Any], Result]]:
    """Import a command's module; return the class of its options and its function."""
    module_name, options_name, function_name = command.target.split(":")
    module = importlib.import_module(module_name)
    return getattr(module, options_name), getattr(module, function_name)


def parse(options: type[Any], prog: str, arguments: Sequence[str]) -> Any:
    """Read command-line arguments into an options dataclass.

    Flags that had another name once are named by the class attribute RENAMED, old name -> name now: they are
    taken, and help shows one name.

    Raises:
      UserError: an unknown or missing flag, or a value of the wrong type; one line.
      SystemExit: after --help.
    """
    import tyro

    arguments = [_current_flag(argument, getattr(options, "RENAMED", {})) for argument in arguments]
    flags = _flags_of(options, pairs=hasattr(options, "of_preset"))
    given = [flag for argument in arguments if (flag := _flag(argument)).startswith("--")]
    for flag in given:
        if flag not in (*flags, "--help", "--"):
            raise UserError(
                f"{prog} has no option {flag!r}; {nearest(flag, flags)} "
                "(a value that begins with dashes is given as --option=VALUE)"
            )
    _check_numbers(arguments, flags)
    constructor: Callable[..., Any] = options
    about = None
    if hasattr(options, "of_preset"):
        preset, about = _preset(prog, arguments, flags)
        settings = frozenset(flags[flag].setting for flag in given if flag in flags)
        constructor = functools.partial(options.of_preset(preset), given=settings)
        if _asks_for_help(arguments):  # alone, for tyro leaves out of it which words were given before
            arguments = ["--help"]
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            value, unknown = tyro.cli(
                constructor,
                prog=prog,
                description=about and f"{_first_line(options)}\n\n{about}",
                args=arguments,
                return_unknown_args=True,
                config=_markers(options),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(captured.getvalue())}; {prog} --help tells the options") from None
    if unknown:
        raise UserError(f"{prog} can't use {unknown[0]!r}; {prog} --help tells the options")
    require_local_paths(value)
    return value


def _markers(options: type[Any]) -> tuple[Any, ...]:
    """Return how tyro makes flags: where a preset may say yes, there is a --no-X beside every --X."""
    import tyro

    own_names = hasattr(options, "of_preset")
    return (tyro.conf.OmitArgPrefixes,) if own_names else (tyro.conf.FlagCreatePairsOff,)


def _flags_of(options: type[Any], pairs: bool) -> dict[str, _Flag]:
    """Return the flags of an options dataclass, those of dataclasses inside it included.

    Args:
      options: the class.
      pairs: whether there is a --no-X beside a --X.
    """
    import tyro

    flags: dict[str, _Flag] = {}
    for name, whole in get_type_hints(options, include_extras=True).items():
        hint, *marks = get_args(whole) if get_origin(whole) is Annotated else (whole,)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            flags |= _flags_of(hint, pairs)
        elif get_origin(hint) is not ClassVar and not {tyro.conf.Suppress, tyro.conf.Positional} & set(marks):
            flag = _Flag(name, get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
            flags[f"--{name.replace('_', '-')}"] = flag
            if hint is bool and pairs and tyro.conf.FlagCreatePairsOff not in marks:
                flags[f"--no-{name.replace('_', '-')}"] = flag
    return flags


def _check_numbers(arguments: Sequence[str], flags: Mapping[str, _Flag]) -> None:
    """Raise UserError where a flag that takes one number is given something else."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        flag, (name, equals, value) = flags.get(_flag(argument)), argument.partition("=")
        value = value if equals else following
        if flag is None or not value or (value.startswith("--") and not equals):
            continue  # no value: tyro says so
        if value == "None" and types.NoneType in flag.types:
            continue
        kinds = [kind for kind in flag.types if kind is not types.NoneType]
        try:
            if kinds in ([int], [float]):
                kinds[0](value)
        except ValueError:
            number = f"whole number, such as {_near(value)}" if kinds == [int] else "number, such as 0.001"
            raise UserError(f"{name} {value}: expected a {number}") from None


def _near(text: str) -> int:
    """Return the whole number that may be meant by 1e3 or 2.5; 1000 where none is seen."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return 1000


def _preset(prog: str, arguments: Sequence[str], flags: Mapping[str, _Flag]) -> tuple[str, str]:
    """Return the preset that arguments name, and what --help says of it; UserError when they name none."""
    from jaxgpt.shared.presets import PRESETS

    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            return word, f"Values shown are {word}'s."
        flag = flags.get(_flag(word))
        if flag and bool not in flag.types and "=" not in word:
            next(words, None)
    if not _asks_for_help(arguments):
        raise UserError(f"{prog} needs a preset first; expected one of: {', '.join(PRESETS)}")
    return "tiny", f"Values shown are tiny's; {prog} gpt2 --help shows gpt2's."


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _first_line(options: type[Any]) -> str:
    return (options.__doc__ or "").partition("\n")[0]


def _flag(argument: str) -> str:
    """Return the flag of an argument as help spells it: --n-layer of --n_layer=3."""
    return argument.partition("=")[0].replace("_", "-")


def _current_flag(argument: str, renamed: Mapping[str, str]) -> str:
    """Return an argument with a flag's old name replaced by its name now."""
    flag, equals, value = argument.partition("=")
    return f"{renamed.get(flag.replace('_', '-'), flag)}{equals}{value}"


def _one_line(box: str) -> str:
    """Turn tyro's framed message into one line: its first paragraph, without the frame."""
    lines = [re.sub(r"[─━╭╮╰╯│┃]|-{3,}", " ", line).strip() for line in box.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if (kept and not line) or line.startswith(("For full helptext", "Argument helptext")):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split()) or "the options do not fit"


COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")  # tyro's names
SHELLS = ("bash", "zsh", "fish")


def _complete(prog: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> None:
    """Print or write the script with which a shell completes a program's commands and their flags."""
    flag, *rest = arguments
    to_file = flag.replace("_", "-") == COMPLETION[1]
    if len(rest) != 1 + to_file or rest[0] not in SHELLS:
        what = "a shell and a file" if to_file else "a shell"
        raise UserError(
            f"{flag} takes {what}, such as {flag} bash{' FILE' * to_file}; shells: {', '.join(SHELLS)}"
        )
    import tyro

    from jaxgpt.shared.files import write_atomic

    choices = []
    for name, command in commands.items():
        options, _ = _load(command)
        constructor = options.of_preset("tiny") if hasattr(options, "of_preset") else options
        subcommand = tyro.conf.subcommand(name, constructor=constructor)
        choices.append(Annotated[(Any, subcommand, *_markers(options))])
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        every_command: Any = functools.reduce(operator.or_, choices)
        tyro.cli(every_command, prog=prog, args=[COMPLETION[0], rest[0]])
    if to_file:
        write_atomic(Path(rest[1]), script.getvalue())
    else:
        sys.stdout.write(script.getvalue())


def cpu_seconds() -> float:
    """CPU time of this process and its finished children so far, user + system, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
