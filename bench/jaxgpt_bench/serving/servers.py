"""The servers that `jaxgpt-bench serving` starts itself: ours, and llama.cpp's with the same weights."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.shared.errors import UserError

SLOTS = 16  # texts that a server runs side by side
SECONDS_TO_START = 120


@contextlib.contextmanager
def our_server(artifact: Path) -> Iterator[str]:
    """Serve an artifact; yields the address."""
    command = [sys.executable, "-m", "jaxgpt_export", "serve", "--artifact", str(artifact), "--port", "0"]
    command += ["--json", "--draft-tokens", "0", "--max-running", str(SLOTS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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

    Flash attention is on, all cores compute, and there are as many slots as ours has.

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
    cores = str(len(os.sched_getaffinity(0)))
    command += ["-t", cores, "-tb", cores]
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        except OSError as error:
            raise UserError(f"--llama-server {program} can't be started ({error})") from None
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
