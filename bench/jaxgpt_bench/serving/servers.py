"""The servers that `jaxgpt-bench serving` starts itself: ours, and llama.cpp's with the same weights."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import usable_cores
from jaxgpt_bench.common.workers import HUGE_PAGES
from jaxgpt_bench.noise.meter import own_cpu_seconds
from jaxgpt_bench.peers.llama_cpp_ import has_amx
from jaxgpt_bench.serving import launcher
from jaxgpt_bench.serving.options import SLOTS

if TYPE_CHECKING:
    import psutil

SECONDS_TO_START = 120


def require_program(program: Path) -> None:
    """Raise UserError where --llama-server names no program."""
    if shutil.which(program) is None:
        raise UserError(f"--llama-server {program} can't be started: it is not there, or not executable")


def ended_with_us(command: list[str]) -> list[str]:
    """Return the command that runs this one and ends it when this process ends, be it killed."""
    return [sys.executable, "-I", str(Path(launcher.__file__)), str(os.getpid()), *command]


def cpu_seconds_beside(addresses: Iterable[str]) -> Callable[[], float | None]:
    """Return what tells the CPU seconds of this program and of servers that run already on this machine.

    Args:
      addresses: of the servers. Where the process of a local one can't be found (it is another user's), what
        is returned tells None.
    """
    found = [_listening(address) for address in addresses if _is_here(address)]
    processes = [process for process in found if process is not None]
    if len(processes) < len(found):
        return lambda: None
    return lambda: own_cpu_seconds(processes)


def _is_here(address: str) -> bool:
    return urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def _listening(address: str) -> "psutil.Process | None":
    """Return the process that serves a port of this machine; None where the system does not tell."""
    import psutil

    port = urllib.parse.urlsplit(address).port or 80
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None:
                return psutil.Process(each.pid)
    except psutil.Error:
        pass
    return None


@contextlib.contextmanager
def our_server(artifact: Path) -> Iterator[str]:
    """Serve an artifact; yields the address."""
    command = [sys.executable, "-m", "jaxgpt_export", "serve", "--artifact", str(artifact), "--port", "0"]
    command += ["--json", "--draft-tokens", "0", "--max-running", str(SLOTS)]
    process = subprocess.Popen(ended_with_us(command), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"jaxgpt-export serve --artifact {artifact} did not start; its line says why")
        yield str(json.loads(line)["address"])
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def llama_server(program: Path, artifact: Path, scratch: Path) -> Iterator[str]:
    """Serve an artifact's weights as Q8_0 with llama.cpp's server; yields the address.

    Flash attention is on, all cores compute, weights lie in memory of their own, in huge pages where there
    are some, and there are as many slots as ours has.

    Raises:
      UserError: the program does not start.
    """
    from jaxgpt_export.format.artifact import read_artifact
    from jaxgpt_export.interchange.gguf_file import write_gguf

    read, model, log = read_artifact(artifact), scratch / "q8_0.gguf", scratch / "llama-server.log"
    write_gguf(read, read.tokenizer(), model, "q8_0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(SLOTS), "-c", str(SLOTS * read.config.block_size), "-fa", "on"]
    cores = str(usable_cores())
    command += ["-t", cores, "-tb", cores, "--no-mmap", *(["--no-repack"] if has_amx() else [])]
    environment = {**os.environ, **HUGE_PAGES}
    with log.open("wb") as output:
        process = subprocess.Popen(ended_with_us(command), stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + SECONDS_TO_START
        while not _is_ready(address):
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise UserError(f"--llama-server {program} did not start ({' '.join(last)})")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
