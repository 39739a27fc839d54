"""What a model wrote can't do any harm: each program here tries some."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jaxgpt_bench.sandbox.sandbox import (
    PROGRAM,
    TRIES,
    Limits,
    Outcome,
    require_sandbox,
    run_program,
    run_programs,
)

from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.usefixtures("sandbox")
SHORT = Limits(seconds=1.0, memory_mb=256, files_mb=2, processes=3)


def refused(action: str, reason: str) -> str:
    """A program that passes where the system refuses what it does for this reason (a name of errno)."""
    return f"""
import errno
try:
    {action}
except OSError as error:
    assert error.errno == errno.{reason}
else:
    raise LookupError
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("total = sum(range(10))", "passed"),
        ("assert 1 == 2, 'no'", "AssertionError"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "left before its end"),
        ("import os; os.kill(os.getpid(), 9)\nwhile True: pass", "timed out"),  # process 1 hears no SIGKILL
        ("while True: pass", "timed out"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("x = bytearray(10 * 10**9)", "MemoryError"),
        (refused("import socket; socket.create_connection(('127.0.0.1', 22), 1)", "ENETUNREACH"), "passed"),
        (refused("import socket; socket.create_connection(('8.8.8.8', 53), 1)", "ENETUNREACH"), "passed"),
        ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
        ("import socket; socket.socket(socket.AF_INET6)", "passed"),
        ("import socket; socket.socketpair()", "passed"),
        ("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "PermissionError"),
        (
            "import socket; socket.socketpair(socket.AF_UNIX, 0x80000 | socket.SOCK_SEQPACKET)",
            "PermissionError",
        ),
        ("import os; os.memfd_create('x')", "PermissionError"),
        ("import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1", "passed"),
        ("if __name__ == '__main__':\n    n = int(input())", "passed"),
        (refused("open('/tmp/from-a-sandbox', 'w')", "EROFS"), "passed"),
        ("open('small', 'w').write('x' * 1000)\nassert len(open('small').read()) == 1000", "passed"),
        (refused("open('large', 'wb').write(b'x' * 3 * 10**6)", "EFBIG"), "passed"),
        (refused("for i in range(100): open(str(i), 'wb').write(b'x' * 10**5)", "ENOSPC"), "passed"),
        ("import os; assert os.listdir('.') == [] and os.listdir('/proc') == []", "passed"),
        ("import os; assert not os.path.exists('/dev/pts') or os.listdir('/dev/pts') == []", "passed"),
        ("open('/dev/null', 'w').write('x')", "passed"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "Exception"),
    ],
)
def test_how_a_program_ends(source: str, why: str) -> None:
    outcome = run_program(source, SHORT)
    assert outcome.why == why
    assert outcome.passed == (why == "passed")


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError(read())",
        "assert False, read()",
        "raise type(read(), (ValueError,), {})",
        "class Meta(type):\n    __mro__ = property(lambda kind: [type(read(), (), {})])\n"
        "raise Meta('E', (ValueError,), {})",
        "import sys\nsys._getframe(1).f_locals['report'](read())",
    ],
)
def test_no_file_s_content_comes_out(source: str, tmp_path: Path) -> None:
    """A program can read the user's files, and how it ended is written into results."""
    secret = tmp_path / "secret.txt"
    secret.write_text("0123456789", encoding="utf-8")
    for folder in (secret, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    outcome = run_program(f"read = lambda: open({str(secret)!r}).read()\nassert read()\n{source}", SHORT)
    assert outcome.why in ("ValueError", "AssertionError", "BaseException", "left before its end")


def test_a_fork_bomb_stays_small_and_dies() -> None:
    source = """
import os, time
made = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    assert made == 2
else:
    raise LookupError
"""
    assert run_program(source, SHORT).passed
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run_program(bomb, SHORT).why == "timed out"
    mine = [path for path in Path("/proc").iterdir() if path.name.isdigit() and _runs_a_sandbox(path)]
    assert mine == []


def _runs_a_sandbox(process: Path) -> bool:
    try:
        return (
            b"sandbox_process.py" in (process / "cmdline").read_bytes()
            and f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
        )
    except OSError:
        return False


def test_files_outside_stay(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine", encoding="utf-8")
    kept.chmod(0o666)  # anybody may write it, but for the mount
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o777)
    source = f"import shutil; shutil.rmtree({str(tmp_path)!r}, ignore_errors=True); open({str(kept)!r}, 'a')"
    assert run_program(refused(source, "EROFS"), SHORT).why == "passed"
    assert kept.read_text(encoding="utf-8") == "mine"


def test_rights_can_not_be_had_back() -> None:
    """Neither a new mount nor a new namespace makes a file writable."""
    source = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(None, b"/", None, 32 | 4096, None) != 0
libc.unshare(0x10000000 | 0x20000)
clear = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(clear), ctypes.c_size_t(32))
"""
    assert run_program(source + refused("open('/tmp/from-a-sandbox', 'w')", "EROFS"), SHORT).why == "passed"


def test_many_programs_run_in_order_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counted(source: str, limits: Limits) -> Outcome:
        ran.append(source)
        return run_program(source, limits)

    monkeypatch.setattr("jaxgpt_bench.sandbox.sandbox.run_program", counted)
    sources = ["x = 1", "assert False", "x = 1"]
    outcomes = run_programs(sources, SHORT)
    assert [outcome.passed for outcome in outcomes] == [True, False, True]
    assert sorted(ran) == sorted(set(sources))


def test_a_program_that_leaves_its_session_ends_too() -> None:
    started = time.monotonic()
    source = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
"""
    assert run_program(source, SHORT).passed
    assert time.monotonic() - started < 30


def test_a_sandbox_that_fails_once_is_put_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine fails to, now and then, among tens of thousands of programs."""
    answers: list[str] = []
    monkeypatch.setattr("jaxgpt_bench.sandbox.sandbox._how_it_ends", lambda *_: answers.pop(0))
    failed = "no sandbox: it did not answer"
    answers += [failed, failed, "passed"]
    assert run_program("x = 1", SHORT) == Outcome(True, "passed")
    answers += [failed] * TRIES
    with pytest.raises(UserError, match=r"3 times in a row, and could before \(it did not answer\)"):
        run_program("x = 1", SHORT)
    assert answers == []
    answers += [failed, "passed"]
    with pytest.raises(UserError, match="this system gives none"):
        require_sandbox.__wrapped__()  # where there was none yet, one failure says so
    assert answers == ["passed"]


def test_a_program_that_did_not_begin_did_not_time_out() -> None:
    """Its clock starts when its sandbox is up, however long that takes."""
    slow = """
import time
import sandbox_process as inside
inside.take_namespaces = lambda: None
inside.child = lambda task, pipe: time.sleep(60)
inside.STARTS_S = 0.05
print(inside.watch({"seconds": 0.01}))
"""
    done = subprocess.run([sys.executable, "-c", slow], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert done.stdout == "no sandbox: it did not begin\n", done.stderr
