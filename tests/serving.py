"""A server process for tests, and what it is asked."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from waiting import killed_at_end, read_line

SECONDS = 60  # until a server has answered, on a busy machine


class Served(NamedTuple):
    """A server that runs."""

    address: str
    process: "subprocess.Popen[str]"

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.address}{path}", json=body, headers=headers, timeout=SECONDS)

    def complete(self, **body: object) -> dict[str, Any]:
        answer = self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, **body: object) -> list[Any]:
        """The events of a streamed completion; checks that they are written to the letter."""
        wish, address = {**body, "stream": True}, f"{self.address}/v1/completions"
        with httpx.stream("POST", address, json=wish, timeout=SECONDS) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = answer.read().decode()
        *events, last, end = text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name: str) -> float:
        """The sum over the models of a metric, which /metrics has."""
        lines = httpx.get(f"{self.address}/metrics", timeout=SECONDS).text.splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(f"jaxgpt_{name}{{")]
        assert found, f"/metrics has no jaxgpt_{name}"
        return sum(found)


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[Served]:
    """A server on a free port, ended at the end."""
    command = [sys.executable, "-m", "jaxgpt_export", "serve", "--port", "0", "--json"]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'export'}"}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with killed_at_end(process):
        yield Served(json.loads(read_line(process, "the address of the server"))["address"], process)
