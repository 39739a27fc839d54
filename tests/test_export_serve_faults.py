"""`jaxgpt-export serve` where something fails: a client leaves, time ends, a thread fails, a signal comes."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import python
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.generation.open_session import open_model
from jaxgpt_export.serve.api.api_error import ApiError
from jaxgpt_export.serve.api.wishes import count_prompts
from jaxgpt_export.serve.app import State, _health
from jaxgpt_export.serve.metrics import Metrics
from jaxgpt_export.serve.served_model import Limits, OneSlot, open_served_model
from jaxgpt_export.serve.worker import Caller, FailedError, Job, Worker
from serving import SECONDS, serving
from waiting import killed_at_end, read_line

from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.scheduling.scheduler import Scheduler, Text
from jaxgpt.generation.session import BatchSession
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.errors import UserError


class DamagedSession:
    """A module whose logits are NaN after token 7."""

    block_size = 64

    def __init__(self) -> None:
        self.held: list[int] = []
        self.most = 0  # tokens that it held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    decode = prefill

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        self.held += tokens
        self.most = max(self.most, len(self.held))
        rows = len(tokens) if all_logits else 1
        return np.full((rows, 9), np.nan if 7 in self.held else 1.0, np.float32)

    def truncate(self, length: int) -> None:
        del self.held[length:]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_module_that_is_damaged_writes_no_text(int8_dynamic: Path, temperature: float) -> None:
    session = DamagedSession()
    scheduler = Scheduler(OneSlot(session))
    tokenizer = read_artifact(int8_dynamic).tokenizer()
    for prompt in ((5, 7), (5, 6)):
        text = Text(GenerationState(tokenizer, prompt, 64, 3, Sampling(temperature)))
        scheduler.submit(text)
        while scheduler.busy:
            scheduler.step()
        assert isinstance(text.error, UserError) == (7 in prompt)
        assert len(text.state.tokens) == (0 if 7 in prompt else 3)
        assert session.most == (2 if 7 in prompt else 4)


@pytest.fixture
def scheduler(int8_dynamic: Path) -> Scheduler:
    session = open_model(read_artifact(int8_dynamic), "auto", 1).new_session(4)
    if not isinstance(session, BatchSession):
        pytest.skip("no C++ compiler built the engine")
    return Scheduler(session, 2)


def new_job(int8_dynamic: Path) -> Job:
    tokenizer = read_artifact(int8_dynamic).tokenizer()
    states = [GenerationState(tokenizer, "return", 64, 20, Sampling(0.8, seed=seed)) for seed in (1, 2, 3)]
    return Job([Text(state, owner="x") for state in states], Caller("x", 0.0, lambda *_: None))


async def updates_of(job: Job) -> AsyncIterator[Any]:
    while (new := await asyncio.wait_for(job.updates(), SECONDS)) is not None:
        for update in new:
            yield update


def test_a_text_that_is_cancelled_behind_a_step_ends_with_the_next_one(
    scheduler: Scheduler, int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = scheduler.step

    def cancelled_meanwhile() -> list[Text]:
        found = step()
        for text in found:
            text.cancelled = True
        return found

    monkeypatch.setattr(scheduler, "step", cancelled_meanwhile)
    worker = Worker(scheduler, 8)

    async def ended() -> list[int]:
        for _ in range(3):
            job = new_job(int8_dynamic)
            worker.submit(job)
            places = [update.place async for update in updates_of(job) if update.finished]
            assert sorted(places) == [0, 1, 2]
        return places

    asyncio.run(ended())
    assert worker.idle
    assert not worker.failed
    worker.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_ends_its_texts_and_is_seen(
    int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_served_model("small", int8_dynamic, Limits(2, 8, 1.0, 0, 1000), "auto", 1, "fp16", 0)
    worker, state = model.worker, State({"small": model}, 0.0, Metrics())
    assert _health(state).status_code == 200
    monkeypatch.setattr(worker._scheduler, "step", lambda: {}["gone"])

    async def failed() -> None:
        job = new_job(int8_dynamic)
        worker.submit(job)
        assert all([update.finished async for update in updates_of(job)])
        assert all(isinstance(text.error, KeyError) for text in job.texts)
        with pytest.raises(FailedError):
            worker.submit(new_job(int8_dynamic))

    asyncio.run(failed())
    assert worker.idle
    with pytest.raises(ApiError, match="small failed; restart the server"):
        _health(state)


def test_a_prompt_whose_time_is_over_before_it_is_scored_is_an_error_and_counted(int8_dynamic: Path) -> None:
    wish = {"prompt": "return the mean of " * 3, "max_tokens": 2, "echo": True, "logprobs": 1}
    with serving("--artifact", int8_dynamic, "--max-seconds", 1e-6) as served:
        answer = served.post("/v1/completions", wish)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "time_over")
        streamed = served.post("/v1/completions", {**wish, "stream": True})
        error = json.loads(streamed.text.removeprefix("data: "))["error"]
        assert error["code"] == "time_over"
        assert served.post("/v1/completions", {"prompt": 5}).status_code == 400
        digits = {"prompt": "a", "logit_bias": {"1" * 5000: 1}}
        assert served.post("/v1/completions", digits).json()["error"]["param"] == "logit_bias"
        lines = httpx.get(f"{served.address}/metrics").text.splitlines()
        counted = {line.split('status="')[1][:3]: float(line.split()[-1]) for line in lines
                   if line.startswith("jaxgpt_requests_total{")}  # fmt: skip
    assert counted == {"503": 1.0, "200": 1.0, "400": 2.0}


def test_prompts_are_counted_before_they_are_made() -> None:
    assert [count_prompts(value) for value in ("a", ["a", "b"], [1, 2, 3], [[1], [2]], [], None, 5)] == [
        1, 2, 1, 2, 1, 1, 1,
    ]  # fmt: skip


def test_a_page_may_send_what_its_client_adds_and_a_template_begins_with_the_begin_token(
    int8_dynamic: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(int8_dynamic, tmp_path / "own")
    (own / "certificate.json").unlink()
    (own / "chat_template.jinja").write_text("{{ raise_exception(bos_token ~ ' and ' ~ eos_token) }}")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    vocabulary = json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]
    begin = next(token for token in vocabulary if token.isalpha() and token.isascii() and len(token) > 2)
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": begin}))
    with serving("--artifact", own, "--cors", "https://page.example") as served:
        asked = "authorization,content-type,x-stainless-os"
        page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": asked}  # fmt: skip
        preflight = httpx.options(f"{served.address}/v1/chat/completions", headers=page)
        assert preflight.headers["access-control-allow-headers"] == asked
        found = httpx.get(f"{served.address}/tokenizer_info").json()
        assert (found["bos_token"], found["eos_token"]) == (begin, "<|endoftext|>")
        chat = {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "text"}}
        answer = served.post("/v1/chat/completions", chat)
        assert f"{begin} and <|endoftext|>" in answer.json()["error"]["message"]
        chat["response_format"] = {"type": "json_object"}
        assert served.post("/v1/chat/completions", chat).json()["error"]["param"] == "response_format"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_models_load_ends_at_once_and_tells_a_sender_of_half_a_request(
    number: signal.Signals,
) -> None:
    code = (
        "import socket, time\n"
        "from jaxgpt_export.serve.command import Loading\n"
        "from jaxgpt_export.serve.guard import Rules\n"
        "from jaxgpt_export.serve.served_model import Limits\n"
        "from jaxgpt_export.serve.server import Server\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "limits = Limits(1, 1, 1.0, 0, 1000)\n"
        "loading, rules = Loading(lambda: time.sleep(600)), Rules('127.0.0.1', None, (), 1000)\n"
        "server = Server(loading, rules, limits, print)\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "print('interrupted', server.run(listener), flush=True)\n"
    )
    arguments, environment = python(code)
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True)
    with killed_at_end(process):
        port = int(read_line(process, "the server"))
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
            answer = httpx.get(f"http://127.0.0.1:{port}/health")  # answered after the half has come
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            process.send_signal(number)
            refused = http.client.HTTPResponse(half)
            refused.begin()
            assert (refused.status, json.load(refused)["error"]["code"]) == (503, "shutting_down")
        said, complaints = process.communicate(timeout=SECONDS)
    assert said == f"interrupted {number == signal.SIGINT}\n"
    assert "Traceback" not in complaints
    assert process.returncode == 0
