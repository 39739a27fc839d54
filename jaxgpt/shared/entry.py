"""What a console program needs before anything that takes time is imported: Ctrl-C that leaves with 130.

    def main(argv: Sequence[str] | None = None) -> int:
        with CtrlC(argv is None):
            from jaxgpt.shared.console import run

            return run("jaxgpt", ABOUT, COMMANDS, argv)

Files appear whole or not at all (files.py), so a process may end at any moment. Imports little itself.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NamedTuple, NoReturn

INTERRUPTED = 130  # exit code: 128 + SIGINT
NOTHING_HALF_WRITTEN = "interrupted; nothing half-written is left under a final name"


class Command(NamedTuple):
    """One line of a program's table of commands.

    Attributes:
      target: "module:OptionsClass:function"; the module is imported when the command is chosen.
      about: what it does, the first line of the options' docstring.
    """

    target: str
    about: str


class CtrlC:
    """While it is entered, Ctrl-C raises KeyboardInterrupt where that is safe, and else ends the process.

    Args:
      is_own: the process is the program's own, and not that of a caller, who keeps what he has.
    """

    def __init__(self, is_own: bool) -> None:
        # Not where a shell has it ignored, as for a command that it sends to the background.
        by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._is_own = is_own and by_default and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._is_own:
            signal.signal(signal.SIGINT, _interrupt)
            sys.unraisablehook = _interrupt_again
            # Registered first, it is called last: all is done, and the interpreter that takes itself apart
            # would set the signal back to its default, which kills.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        if self._is_own:  # threads are still to end, and what was registered to be done at the end
            signal.signal(signal.SIGINT, lambda *_: leave(NOTHING_HALF_WRITTEN))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; leave at once where a module is being imported.

    There an exception may be lost, or end the interpreter with a core dump: modules in C++ import others.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave(NOTHING_HALF_WRITTEN)
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Send Ctrl-C once more where its exception was lost, as it is in a callback of the garbage collector."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def leave(text: str, code: int = INTERRUPTED) -> NoReturn:
    """End the process now, if not told otherwise with the code of Ctrl-C: no thread is waited for."""
    if os.isatty(2):
        text = f"\x1b[?25h\n{text}"  # a progress display hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
    os._exit(code)
