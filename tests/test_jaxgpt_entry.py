"""Ctrl-C in a console program, from its first moment on."""

import subprocess

import pytest
from conftest import python

PROGRAMS = ("jaxgpt", "jaxgpt_export", "jaxgpt_bench")
LINE = "interrupted; nothing half-written is left under a final name\n"

# Sends Ctrl-C when a module is looked for; `also` runs before, as a test needs it.
CODE = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = [{program!r}, *{arguments!r}]
from {program}.cli import main
{also}
sys.exit(main())
"""


def interrupted(
    program: str, module: str, *arguments: str, also: str = ""
) -> subprocess.CompletedProcess[str]:
    code = CODE.format(program=program, module=module, arguments=arguments, also=also)
    command, environment = python(code)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("module", ["jaxgpt.shared.console", "rich.console", "tyro"])
def test_ctrl_c_while_a_program_starts_is_code_130_and_one_line(program: str, module: str) -> None:
    command = {"jaxgpt": "plan", "jaxgpt_export": "compare", "jaxgpt_bench": "quality"}[program]
    done = interrupted(program, module, command, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


# What a library does: it takes the exception for one of its own, in C++, or loses it.
LOST = """
import builtins, gc
def lose(phase, info):
    if phase == "start" and gc.callbacks:
        gc.callbacks.clear()
        signal.raise_signal(signal.SIGINT)
import jaxgpt.shared.console as console
def run(*_):
    gc.callbacks.append(lose)
    gc.collect()
    try:
        while True: import time; time.sleep(0.01)
    except KeyboardInterrupt:
        console.say("interrupted again")
        return 130
console.run = run
"""


def test_ctrl_c_whose_exception_is_lost_comes_again() -> None:
    done = interrupted("jaxgpt", "nothing", also=LOST)
    assert (done.returncode, done.stderr) == (130, "interrupted again\n")


# Called when the interpreter clears its modules, after all that was registered for the end.
AT_THE_VERY_END = """
class Last:
    def __del__(self, kill=os.kill, own=os.getpid()):
        kill(own, 2)
sys.last = Last()
"""


def test_ctrl_c_after_all_is_done_changes_nothing() -> None:
    done = interrupted("jaxgpt", "nothing", "--version", also=AT_THE_VERY_END)
    assert done.returncode == 0
    assert done.stderr.startswith("jaxgpt ")


def test_ctrl_c_that_a_shell_has_ignored_stays_so() -> None:
    also = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = interrupted("jaxgpt", "tyro", "plan", "--help", also=also)
    assert done.returncode == 0, done.stderr
    assert "usage: jaxgpt plan" in done.stdout


def test_a_caller_s_own_ctrl_c_stays_his() -> None:
    """Called with arguments the program is a part of another one, such as this."""
    code = "import signal; from jaxgpt.cli import main; main(['--version']); "
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    command, environment = python(code)
    subprocess.run(command, env=environment, check=True, capture_output=True)
