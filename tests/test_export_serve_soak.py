"""Thousands of requests, many of which are odd or leave: none is lost, none wrong, nothing grows.

pytest -m slow tests/test_export_serve_soak.py
"""

import asyncio
import json
import random
import urllib.parse
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Served, serving

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS, BODIES, FUZZED = 10_000, 16, 200, 5_000
MOST_GROWTH = 0.05  # of the memory after a tenth of the requests


def body(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    prompt: Any = draw.choice(["def f(x):", "return", "", "日本 🎉", [5, 6, 7, 8] * draw.randint(1, 12)])
    wish: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randint(1, 24), "seed": number}
    wish["temperature"] = draw.choice([0, 0.7, 1.2])
    if draw.random() < 0.2:
        wish |= {"logprobs": draw.randint(0, 3), "echo": draw.random() < 0.5}
    if draw.random() < 0.2:
        wish |= {"stop": ["\n", "x"], "frequency_penalty": 0.5, "logit_bias": {"9": -3}}
    if draw.random() < 0.1:
        wish |= {"n": 2}
    if draw.random() < 0.1:
        odd = draw.choice(["n", "temperature", "stop"])
        wish = {"prompt": prompt, "seed": number, odd: draw.choice([-1, {}, "?" * 9, 1e9])}
    return wish


async def ask(address: str, wish: dict[str, Any], leave: bool) -> tuple[int, Any] | None:
    url = urllib.parse.urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    content = json.dumps(wish).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
    try:
        if leave:
            await asyncio.sleep(random.random() * 0.01)
            return None
        answer = await asyncio.wait_for(reader.read(-1), 120)
        status, _, rest = answer.partition(b"\r\n")
        parsed = json.loads(rest.partition(b"\r\n\r\n")[2])
        return int(status.split()[1]), parsed.get("choices", parsed.get("error"))
    finally:
        writer.close()


def test_soak(int8_dynamic: Path) -> None:
    with serving("--artifact", int8_dynamic, "--cache-mb", 1) as server:
        asyncio.run(soak(server))


async def soak(server: Served) -> None:
    alone = [await ask(server.address, body(number), False) for number in range(BODIES)]
    assert 10 < sum(answer is not None and answer[0] == 400 for answer in alone) < BODIES / 2
    numbers = iter(range(REQUESTS))
    draw = random.Random(0)
    server_process = psutil.Process(server.process.pid)
    memory: list[int] = []

    async def client() -> None:
        for number in numbers:
            which, leave = draw.randrange(BODIES), draw.random() < 0.2
            found = await ask(server.address, body(which), leave)
            assert leave or found == alone[which]
            if number in (REQUESTS // 10, REQUESTS - 1):
                memory.append(server_process.memory_info().rss)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    assert memory[1] <= memory[0] * (1 + MOST_GROWTH), memory
    while server.metric("running") or server.metric("waiting"):
        await asyncio.sleep(0.05)
    print(f"memory {memory[0] / 1e6:.1f} MB after a tenth, {memory[1] / 1e6:.1f} MB at the end")  # noqa: T201


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    kinds = [
        lambda: draw.choice([None, True, False, "", "a", "\ud800", "日", "x" * 3000]),
        lambda: draw.choice([0, 1, -1, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, 3.0, 10**400]),
        lambda: [odd_value(draw, depth + 1) for _ in range(draw.randint(0, 3))] if depth < 3 else [],
        lambda: {str(odd_value(draw, 3)): odd_value(draw, depth + 1)} if depth < 3 else {},
    ]
    return draw.choice(kinds)()


FIELDS = (
    "prompt",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "logprobs",
    "echo",
    "logit_bias",
    "stream",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "stream_options",
    "user",
    "suffix",
    "best_of",
    "messages",
    "tokens",
    "content",
)


def test_fuzz(int8_dynamic: Path) -> None:
    draw = random.Random(1)
    with serving("--artifact", int8_dynamic) as server, httpx.Client(timeout=120) as http:
        seen: dict[int, int] = {}
        for _ in range(FUZZED):
            wish = {name: odd_value(draw) for name in draw.sample(FIELDS, draw.randint(0, 5))}
            if draw.random() < 0.7:
                wish |= {"prompt": draw.choice(["a", [1, 2], ["a", "b"], [[3]]])}
            if draw.random() < 0.7:
                wish.pop("model", None)
            path = draw.choice(["/v1/completions", "/tokenize", "/detokenize", "/v1/chat/completions"])
            answer = http.post(f"{server.address}{path}", content=json.dumps(wish).encode())
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (wish, answer.text)
        assert set(seen) <= {200, 400, 404, 429}
        assert seen[200] > FUZZED / 20
        assert server.metric("running") == 0
