"""`jaxgpt-export serve` as a process: clients that leave, a full queue, signals, bad options."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Command, assert_one_line_error, python
from jaxgpt_export.llm import LLM
from serving import SECONDS, Served, serving

PROMPT = "Write a function to add the total by the"
KEY = "a key"


@pytest.fixture(scope="module")
def server(int8_dynamic: Path) -> Iterator[Served]:
    limits = ("--max-running", 3, "--max-waiting", 9, "--max-body-mb", 1)
    with serving("--artifact", f"small={int8_dynamic}", *limits) as served:
        yield served


def wait_until(true: Any) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def open_request(server: Served, **body: object) -> socket.socket:
    content = json.dumps(body).encode()
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_hold_nobody_up(server: Served, stream: bool) -> None:
    before = server.metric("new_tokens_total")
    bias = {"0": -100.0}  # no bursts: steps of one token
    wish = {"prompt": "a", "max_tokens": 10**6, "n": 3, "stream": stream, "logit_bias": bias}
    texts = [open_request(server, **wish) for _ in range(3)]  # some wait
    wait_until(lambda: server.metric("new_tokens_total") > before + 3)
    for text in texts:
        text.close()
    wait_until(lambda: server.metric("running") == server.metric("waiting") == 0)
    assert server.complete(prompt=PROMPT, temperature=0)["usage"]["completion_tokens"] == 16


def test_a_full_queue_says_when_to_come_again(server: Served) -> None:
    wish = {"prompt": "a", "max_tokens": 10**6, "n": 12, "logit_bias": {"0": -100.0}}
    for _ in range(200):  # twelve texts may end before the next request comes
        with open_request(server, **wish), open_request(server, **wish) as second:
            full = http.client.HTTPResponse(second)
            full.begin()
            answer = json.load(full)
        if full.status != 200:
            break
    assert (full.status, full.getheader("retry-after")) == (429, "1")
    assert answer["error"]["type"] == "rate_limit_error"
    wait_until(lambda: server.metric("waiting") == 0)
    assert server.post("/v1/completions", {"prompt": "a", "n": 13}).status_code == 400


def test_half_a_request_and_a_slow_reader_hold_nobody_up(server: Served) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
        with open_request(server, prompt="a", max_tokens=10**6, stream=True, n=3):
            assert server.complete(prompt=PROMPT, temperature=0)["usage"]["completion_tokens"] == 16


def test_a_key_is_asked_for_and_sigterm_lets_running_texts_end(int8_dynamic: Path) -> None:
    with serving("--artifact", int8_dynamic, "--api-key", KEY, "--cors", "https://page.example") as served:
        keyed = {"Authorization": f"Bearer {KEY}"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            answer = httpx.get(f"{served.address}/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{served.address}/health").json() == {"status": "ok"}
        assert httpx.get(f"{served.address}/").status_code == 200
        page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        preflight = httpx.options(f"{served.address}/v1/completions", headers=page)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        body = {"prompt": PROMPT, "max_tokens": 10**6, "stream": True, "logit_bias": {"0": -100}}
        with httpx.stream("POST", f"{served.address}/v1/completions", json=body, headers=keyed) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert served.process.wait(SECONDS) == 0


def test_a_sender_that_leaves_within_its_request_is_no_error_and_ctrl_c_is_130(
    int8_dynamic: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving("--artifact", int8_dynamic) as served:
        host, port = served.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
            assert served.complete(prompt=PROMPT, max_tokens=2)  # so that the half has come
        assert served.complete(prompt=PROMPT, max_tokens=2)  # and that its end has
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(SECONDS) == 130
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_that_ends_tells_a_sender_of_half_a_request(
    int8_dynamic: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving("--artifact", int8_dynamic) as served:
        host, port = served.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
            assert served.complete(prompt=PROMPT, max_tokens=2)  # so that the half has come
            served.process.send_signal(signal.SIGTERM)
            refused = http.client.HTTPResponse(half)
            refused.begin()
            assert refused.status == 503
            assert json.load(refused)["error"]["code"] == "shutting_down"
        assert served.process.wait(SECONDS) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_two_models_and_a_chat_template(int8_dynamic: Path, fp32: Path, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(int8_dynamic, chatty)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (chatty / "chat_template.jinja").write_text(template)
    (chatty / "certificate.json").unlink()  # it does not know the template
    with serving("--artifact", chatty, f"float={fp32}") as served:
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["chatty", "float"]
        messages: Any = [{"role": "user", "content": "return"}]
        wish: dict[str, Any] = {"model": "chatty", "messages": messages, "max_tokens": 9, "temperature": 0}
        answer = client.chat.completions.create(**wish, logprobs=True, top_logprobs=2)
        prompt = "user: return\nassistant:"
        plain = served.complete(model="chatty", prompt=prompt, max_tokens=9, temperature=0)
        assert answer.choices[0].message.content == plain["choices"][0]["text"]
        assert answer.choices[0].logprobs is not None
        scored = answer.choices[0].logprobs.content or []
        assert len(scored) == 9
        assert all(len(token.top_logprobs) == 2 for token in scored)
        stream = list(client.chat.completions.create(**wish, stream=True))
        assert stream[0].choices[0].delta.role == "assistant"
        assert (
            "".join(event.choices[0].delta.content or "" for event in stream) == plain["choices"][0]["text"]
        )
        assert stream[-1].choices[0].finish_reason == "length"
        whole = LLM.load(fp32).generate(prompt, max_new_tokens=9, temperature=0.0)
        assert (
            served.complete(model="float", prompt=prompt, max_tokens=9, temperature=0)["choices"][0]["text"]
            == whole
        )


def test_bad_options_are_one_line(command: Command, int8_dynamic: Path, tmp_path: Path) -> None:
    serve = ("jaxgpt-export", "serve", "--artifact")
    assert_one_line_error(command(*serve, int8_dynamic, int8_dynamic), "two artifacts", "--artifact OTHER=")
    assert_one_line_error(command(*serve, tmp_path / "none"), "missing")
    assert_one_line_error(command(*serve, int8_dynamic, "--port", 70000), "--port", "65535")
    assert_one_line_error(command(*serve, int8_dynamic, "--max-running", 0), "--max-running")
    assert_one_line_error(command(*serve, int8_dynamic, "--max-seconds", "nan"), "--max-seconds is nan")
    assert_one_line_error(command(*serve, int8_dynamic, "--host", "a..b"), "--host a..b")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line_error(command(*serve, int8_dynamic, "--port", port), str(port), "--port")
    broken = tmp_path / "broken"
    shutil.copytree(int8_dynamic, broken)
    (broken / "model.safetensors").write_bytes(b"no")
    assert_one_line_error(command(*serve, broken, "--port", 0), "model.safetensors")


def test_the_server_needs_neither_pytorch_nor_jax() -> None:
    code = "import sys; import jaxgpt_export.serve.command, jaxgpt_export.serve.server\n"
    code += "assert not {'torch', 'jax', 'flax'} & set(sys.modules)"
    arguments, environment = python(code)
    assert subprocess.run(arguments, env=environment, check=False).returncode == 0
