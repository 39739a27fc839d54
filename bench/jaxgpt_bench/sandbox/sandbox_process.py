"""The inside of the sandbox: runs one untrusted program. A file of its own, the standard library alone.

    python -I -S sandbox_process.py  < {"source": ..., "seconds": ..., ...}  > {"why": ...}

This process takes namespaces of its own (user, files, network, processes), forks, and only watches the clock
from then on. Its child sees the machine's files read-only and one empty folder in memory, no network, no
socket of a file and no other process; it gives up every capability before the program begins. (A named pipe
or a device of the machine that anybody may write to stays open to it.) When the child
ends, or its time is over, everything that it started ends with it, for it is process 1 of its namespace.
"""

import builtins
import contextlib
import ctypes
import errno
import json
import os
import resource
import secrets
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE, MS_RDONLY = 0x2, 0x4, 0x4000, 0x40000, 0x1
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 0x1, 442
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 2
# <linux/seccomp.h>, <linux/filter.h>, <linux/audit.h>
SECCOMP_MODE_FILTER, ALLOW, REFUSE = 2, 0x7FFF0000, 0x00050000 | errno.EPERM
LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
AT_NUMBER, AT_ARCHITECTURE, AT_FAMILY, AT_TYPE, X32 = 0, 4, 16, 24, 0x40000000
AF_INET, AF_INET6, SOCK_STREAM, SOCK_TYPES = 2, 10, 1, 0xF
# Numbers of the architecture, and of socket, socketpair, shmget, memfd_create.
CALLS_OF = {"x86_64": (0xC000003E, 41, 53, 29, 319), "aarch64": (0xC00000B7, 198, 199, 194, 279)}
IO_URING_SETUP, MEMFD_SECRET = 425, 447
NOBODY = 65534
POLL_S = 0.002
STARTS_S = 10.0  # to put up the sandbox, on a busy machine

PASSED = "passed"
TIMED_OUT = "timed out"
NO_SANDBOX = "no sandbox"
LEFT = "left before its end"
# All that a program may end with: it reads files, and what it says would lie in results that others see.
EXCEPTIONS = frozenset(
    kind.__name__
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, BaseException)
)

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError unless a call of the C library returned 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def take_namespaces() -> None:
    """Leave the machine's network, processes and mounts behind.

    A process outside says which users there are: nobody, and root where root can say so.
    """
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID
    own, ids = os.getpid(), (os.geteuid(), os.getegid())
    left, leaving = os.pipe()
    outside = os.fork()
    if outside == 0:
        os.close(leaving)
        os.read(left, 1)
        os._exit(write_maps(own, ids))
    check(libc.unshare(kinds), "unshare")
    os.close(left)
    os.close(leaving)
    _, status = os.waitpid(outside, 0)
    number = os.waitstatus_to_exitcode(status)
    if number:
        raise OSError(number, f"user map: {os.strerror(number)}")


def write_maps(process: int, ids: tuple[int, int]) -> int:
    """Say whom the users and groups of a process's namespace are; return an error number."""
    maps = [f"0 0 1\n{NOBODY} {NOBODY} 1" if number == 0 else f"{NOBODY} {number} 1" for number in ids]
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", maps[0]), ("gid_map", maps[1])):
            descriptor = os.open(f"/proc/{process}/{name}", os.O_WRONLY)
            os.write(descriptor, text.encode())
            os.close(descriptor)
    except OSError as error:
        return error.errno or 1
    return 0


def lock_files(folder: str, size: int) -> None:
    """Make all files read-only, but for an empty folder of so many bytes in memory; hide /proc and terminals.

    Without /proc no file of another process can be opened.
    """
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount private")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    locked = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(32)
    )
    check(locked, "mount read-only")
    flags = MS_NOSUID | MS_NODEV
    options = f"size={size},nr_inodes=1000,mode=700,uid={NOBODY},gid={NOBODY}".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options), "mount folder")
    for hidden in ("/proc", "/dev/pts"):  # terminals can be written to however a mount is made
        if os.path.isdir(hidden):
            check(libc.mount(b"tmpfs", hidden.encode(), b"tmpfs", flags | MS_RDONLY, b"size=4096"), "hide")
    os.chdir(folder)


def become_nobody() -> None:
    """Give up what the namespaces gave, for good; root becomes nobody, for its processes have no limit.

    One capability stays, to read files: Python's own may lie in root's folder.
    """
    if os.geteuid() == 0:
        check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    kept = 1 << CAP_DAC_READ_SEARCH
    check(libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)(kept, kept))), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def forbid_calls() -> None:
    """Let the kernel refuse what leads out of the sandbox, or takes memory that no limit counts.

    Sockets but those of the network, of which there is none: one of a file (docker.sock) or of a hypervisor
    leads out of the network's namespace, and so does one end of a pair of datagram sockets, which may name a
    file. Shared memory, which a program holds without mapping it.
    """
    if os.uname().machine not in CALLS_OF:
        raise OSError(errno.ENOSYS, f"sockets can be forbidden on {' and '.join(CALLS_OF)} alone")
    architecture, socket, socketpair, *shared = CALLS_OF[os.uname().machine]
    by_number = (
        (AT_LEAST, "refuse", None, X32),
        *((EQUAL, "refuse", None, number) for number in (IO_URING_SETUP, MEMFD_SECRET, *shared)),
        (EQUAL, "pair", None, socketpair),
        (EQUAL, None, "allow", socket),
    )
    program = with_jumps(
        (LOAD, None, None, AT_ARCHITECTURE),
        (EQUAL, None, "refuse", architecture),  # calls of another width have other numbers
        (LOAD, None, None, AT_NUMBER),
        *by_number,
        (LOAD, None, None, AT_FAMILY),
        (EQUAL, "allow", None, AF_INET),
        (EQUAL, "allow", "refuse", AF_INET6),
        "pair",
        (LOAD, None, None, AT_TYPE),
        (AND, None, None, SOCK_TYPES),
        (EQUAL, "allow", "refuse", SOCK_STREAM),
        "allow",
        (RETURN, None, None, ALLOW),
        "refuse",
        (RETURN, None, None, REFUSE),
    )
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    described = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(filters)))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described, 0, 0), "seccomp")


def with_jumps(*lines: tuple[int, str | None, str | None, int] | str) -> list[tuple[int, int, int, int]]:
    """Return a filter's program, its labels replaced by how many instructions a jump leaves out."""
    places: dict[str, int] = {}
    program: list[tuple[int, str | None, str | None, int]] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(program)
        else:
            program.append(line)

    def jump(label: str | None, place: int) -> int:
        return 0 if label is None else places[label] - place - 1

    return [(code, jump(yes, at), jump(no, at), value) for at, (code, yes, no, value) in enumerate(program)]


def limit(task: dict[str, Any]) -> None:
    """Bound processor time, memory, files and processes."""
    memory, files = task["memory_mb"] * 10**6, task["files_mb"] * 10**6
    seconds = int(task["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NPROC, task["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def run(source: str, report: Callable[[str], None]) -> None:
    """Run a program as an imported module, whose main part does not run; tell how it ended.

    Of an exception the name of its type, or of the nearest one that is Python's own, and none of its text.
    """
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "program"})
    except BaseException as error:
        name = BaseException.__name__
        with contextlib.suppress(BaseException):  # its type may be the program's own, and fail
            name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in EXCEPTIONS)
        report(name)
    else:
        report(PASSED)


def child(task: dict[str, Any], pipe: int) -> None:
    """Be process 1 of the sandbox; never returns."""
    secret = task["secret"]

    def report(text: str) -> None:
        os.write(pipe, f"{secret}{text}".encode("utf-8", "replace"))

    try:
        lock_files(task["folder"], task["files_mb"] * 10**6)
        become_nobody()
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        limit(task)
        forbid_calls()
    except OSError as error:
        report(f"{NO_SANDBOX}: {error}")
        os._exit(0)
    os.write(pipe, b"\n")  # the clock starts
    run(task["source"], report)
    os._exit(0)


def read_until(pipe: int, deadline: float, end: Callable[[bytes], bool]) -> bytes:
    """Read a pipe until its content is what `end` waits for, all writers are gone, or time is over."""
    os.set_blocking(pipe, False)
    found = b""
    while time.monotonic() < deadline and not end(found):
        try:
            new = os.read(pipe, 4096)
        except BlockingIOError:
            time.sleep(POLL_S)
            continue
        if not new:
            break
        found += new
        if len(found) > 10**5:  # no report is so long
            break
    return found


def watch(task: dict[str, Any]) -> str:
    """Run the child and return how it ended."""
    # A program that leaves at once can not claim to have passed; one that reads its callers' frames can.
    task["secret"] = secrets.token_hex(16)
    take_namespaces()
    pipe, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(pipe)
        child(task, writer)
    os.close(writer)
    secret = task["secret"].encode()
    found = read_until(pipe, time.monotonic() + STARTS_S, lambda found: found != b"")
    is_up = found.startswith(b"\n")  # else no time of the program's has passed: it did not begin
    deadline = time.monotonic() + task["seconds"]
    if is_up:
        found += read_until(pipe, deadline, lambda later: secret in found + later)
    late = time.monotonic() >= deadline
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not is_up:
        said = found.removeprefix(secret).decode("utf-8", "replace")
        return said or f"{NO_SANDBOX}: it did not begin"
    if secret in found:  # from a process that the program may have changed: nothing but what is expected
        said = found.split(secret, 1)[1].decode("utf-8", "replace")
        return said if said == PASSED or said in EXCEPTIONS else LEFT
    if late:
        return TIMED_OUT
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return LEFT


def main() -> None:
    """Read a task from stdin, write how it ended to stdout."""
    task = json.load(sys.stdin)
    try:
        why = watch(task)
    except OSError as error:
        why = f"{NO_SANDBOX}: {error}"
    json.dump({"why": why}, sys.stdout)


if __name__ == "__main__":
    main()
