"""A sandbox for programs that a model wrote: a process of its own, without network, in an empty folder.

Time, memory, files and processes are bounded; all files but those of its folder are read-only. It rests on
Linux namespaces, which need no rights; where a system has none, nothing is run. What happens inside is in
sandbox_process.py.
"""

import concurrent.futures
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import usable_cores
from jaxgpt_bench.sandbox.sandbox_process import NO_SANDBOX, PASSED, STARTS_S

PROGRAM = Path(__file__).with_name("sandbox_process.py")
TRIES = 3  # to put up the sandbox of a program where there has been one: a busy machine may fail to


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
      seconds: of wall time.
      memory_mb: address space of each of its processes, 10^6 bytes.
      files_mb: in its folder, 10^6 bytes.
      processes: and threads, itself included.
    """

    seconds: float = 3.0
    memory_mb: int = 512
    files_mb: int = 16
    processes: int = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      passed: it came to its end without an exception.
      why: "passed", "timed out", or what it ended with: of an exception its type alone, for a program can put
        any file's content into its text.
    """

    passed: bool
    why: str


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a program in the sandbox.

    Args:
      source: Python; it passes when it comes to its end.
      limits: what it may take.

    Raises:
      UserError: this system has no sandbox, or fails again and again to put one up.
    """
    require_sandbox()
    for _ in range(TRIES):
        why = _how_it_ends(source, limits)
        if not why.startswith(NO_SANDBOX):
            return Outcome(why == PASSED, why)
    raise UserError(
        f"the sandbox of a program could not be put up {TRIES} times in a row, and could before "
        f"({_reason(why)}); end what else runs on this machine and start again"
    )


def _how_it_ends(source: str, limits: Limits) -> str:
    """Run a program in a sandbox of its own, once; what begins with NO_SANDBOX says that there was none."""
    with tempfile.TemporaryDirectory(prefix="jaxgpt-sandbox-") as folder:
        Path(folder).chmod(0o755)
        task = {"source": source, "folder": folder, **dataclasses.asdict(limits)}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        try:
            out, err = process.communicate(json.dumps(task).encode(), limits.seconds + 2 * STARTS_S)
            return str(json.loads(out)["why"])
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            process.kill()
            _, err = process.communicate()
            lines = err.decode("utf-8", "replace").strip().splitlines()
            return f"{NO_SANDBOX}: {lines[-1] if lines else 'it did not answer'}"


def _reason(why: str) -> str:
    return why.removeprefix(f"{NO_SANDBOX}: ")


def run_programs(sources: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:
    """Run programs, one on each core at a time; the same text is run once.

    Raises:
      UserError: this system has no sandbox, or fails again and again to put one up.
    """
    different = list(dict.fromkeys(sources))

    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        ended = pool.map(functools.partial(run_program, limits=limits), different)
        outcomes = dict(zip(different, ended, strict=True))
    return [outcomes[source] for source in sources]


@functools.cache
def require_sandbox() -> None:
    """Raise UserError where programs can't be run; before a model writes for minutes."""
    why = _how_it_ends("", Limits())
    if why.startswith(NO_SANDBOX):
        raise UserError(
            f"programs that a model wrote run in a sandbox only, and this system gives none "
            f"({_reason(why)}); it takes Linux 5.12 or newer with user namespaces"
        )
