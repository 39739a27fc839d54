"""The routes of `jaxgpt-export serve`, asked without a network: seeds, time, metrics, long requests."""

import asyncio
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import build_model
from jaxgpt_export.serve.api.answer import Answer
from jaxgpt_export.serve.api.chat import ChatReply
from jaxgpt_export.serve.api.completions import CompletionReply
from jaxgpt_export.serve.api.request_fields import Fields
from jaxgpt_export.serve.api.wishes import Prompt, read_wish, seed_of_choice
from jaxgpt_export.serve.app import LEFT, LONG_BODY, READER, State, _counting, build_app, drain
from jaxgpt_export.serve.chat_template import ChatTemplate
from jaxgpt_export.serve.command import _origin
from jaxgpt_export.serve.guard import Rules
from jaxgpt_export.serve.metrics import Metrics
from jaxgpt_export.serve.served_model import Limits, OneSlot, ServedModel, open_served_model
from jaxgpt_export.serve.worker import Caller, Job, Update, Worker
from serving import SECONDS
from tiny_artifacts import tiny_artifact

from jaxgpt.generation.scheduling.scheduler import NewToken
from jaxgpt.shared.errors import UserError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEADS_ROUNDING = 1e-5  # of a float32 product, whose sums have another order for other numbers of rows
NOBODY = Caller("x", 0.0, lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ServedModel]:
    model = open_served_model("small", folder, Limits(4, 8, 0.0, 0, 10**6), "auto", 1, "auto", 0)
    yield model
    model.worker.stop()


@pytest.fixture
def state(model: ServedModel) -> State:
    return State({"small": model}, 0.0, Metrics())


def ask(state: State, method: str, path: str, *, key: str | None = None, **settings: Any) -> httpx.Response:
    """What the routes answer."""
    app = build_app(state, Rules("127.0.0.1", key, (), 10**6))

    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=60) as client:
            return await client.request(method, f"http://127.0.0.1{path}", **settings)

    return asyncio.run(answer())


def complete(state: State, **wish: object) -> httpx.Response:
    return ask(state, "POST", COMPLETIONS, json=wish)


def seeds(model: ServedModel, **fields: object) -> list[int]:
    """The seeds of two choices of a prompt, and of the first one of the same prompt again."""
    wish = read_wish(Fields(fields), model, 16, 0)
    prompt = Prompt("!", model.tokenizer.encode("!"))
    texts = [wish.text(model, prompt, n, logprobs=None, echo=False, caller=NOBODY) for n in (0, 1, 0)]
    return [text.state.sampler.sampling.seed for text in texts]


@pytest.mark.parametrize("fields", [{}, {"seed": None}, {"seed": -1}])
def test_without_a_seed_every_text_has_a_random_one(model: ServedModel, fields: dict[str, object]) -> None:
    assert len({*seeds(model, **fields), *seeds(model, **fields)}) == 6


def test_a_seed_is_that_of_the_first_choice_and_decides_the_others(model: ServedModel) -> None:
    assert seeds(model, seed=7) == [7, seed_of_choice(7, 1), 7]
    assert seed_of_choice(7, 1) == 6801174921074823891
    assert seeds(model, seed=-2)[0] == 2**64 - 2


def test_equal_prompts_have_different_texts_and_with_a_seed_equal_ones(state: State) -> None:
    wish = {"prompt": ["def f(x):"] * 4, "max_tokens": 12}
    texts = [choice["text"] for choice in complete(state, **wish).json()["choices"]]
    assert len(set(texts)) == 4
    texts = [choice["text"] for choice in complete(state, **wish, seed=7).json()["choices"]]
    assert len(set(texts)) == 1


def test_a_text_whose_time_is_over_before_its_first_token_is_an_error(model: ServedModel) -> None:
    late = State({"small": model}, 1e-9, Metrics())
    chat = dataclasses.replace(model, chat_template=ChatTemplate("{{ messages[0].content }}", Path()))
    chatting = State({"small": chat}, 1e-9, Metrics())
    message = {"messages": [{"role": "user", "content": "!"}]}
    for state, path, wish in ((late, COMPLETIONS, {"prompt": "!"}), (chatting, CHAT, message)):
        answer = ask(state, "POST", path, json={**wish, "max_tokens": 4})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "time_over")
        assert "0 of the prompt's 1 tokens" in answer.json()["error"]["message"]
        streamed = ask(state, "POST", path, json={**wish, "max_tokens": 4, "stream": True})
        (event,) = streamed.text.split("\n\n")[:-1]
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "time_over"
    echoed = complete(late, prompt="!", max_tokens=0, echo=True)  # nothing was to be generated
    assert (echoed.status_code, echoed.json()["choices"][0]["text"]) == (200, "!")


def test_no_proxy_is_to_hold_a_stream_back(state: State) -> None:
    headers = complete(state, prompt="a", max_tokens=2, stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-cache")


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fails_ends_its_texts(model: ServedModel, stream: bool) -> None:
    async def fail() -> None:
        wish = read_wish(Fields({"stream": stream}), model, 16, 0)
        prompt = Prompt("!", [1])
        text = wish.text(model, prompt, 0, logprobs=None, echo=False, caller=NOBODY)
        job = Job([text], NOBODY)
        answer = Answer(model, job, CompletionReply(model, [prompt], 1, False, False, False), stream)

        async def no_more() -> dict[str, str]:
            return await asyncio.get_running_loop().create_future()

        async def broken(message: object) -> None:
            raise RuntimeError("no answer is sent")

        with pytest.raises(RuntimeError, match="no answer is sent"):
            await answer({}, no_more, broken)
        assert text.cancelled

    asyncio.run(fail())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_texts(
    model: ServedModel, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text ends by itself here: the worker gets none."""
    monkeypatch.setattr(model.worker, "submit", lambda job: None)
    statuses: list[int] = []

    async def leave() -> None:
        prompt = Prompt("!", [1])
        wish = read_wish(Fields({"stream": stream}), model, 16, 0)
        texts = [wish.text(model, prompt, n, logprobs=None, echo=False, caller=NOBODY) for n in range(3)]
        reply = CompletionReply(model, [prompt], 3, False, False, False)
        answer = Answer(model, Job(texts, NOBODY), reply, stream)

        async def gone() -> dict[str, str]:
            return {"type": "http.disconnect"}

        async def send(message: object) -> None:
            await asyncio.get_running_loop().create_future()  # nobody reads it

        # A task that waits for nothing: seconds are for a busy machine.
        await asyncio.wait_for(_counting(answer, statuses.append)({}, gone, send), SECONDS)
        assert all(text.cancelled for text in texts)

    asyncio.run(leave())
    assert statuses == [200 if stream else LEFT]  # a stream begins before its first token


def test_a_server_that_is_about_to_end_says_so_to_those_who_look(state: State) -> None:
    assert ask(state, "GET", "/health").json() == {"status": "ok"}
    state.draining = True
    for answer in (ask(state, "GET", "/health"), complete(state, prompt="!")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "1"


def test_times_of_tokens_are_those_of_each_text(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 0.0, []
    monkeypatch.setattr("jaxgpt_export.serve.worker.time", SimpleNamespace(perf_counter=lambda: now))

    async def deliver() -> None:
        nonlocal now
        wish = read_wish(Fields({}), model, 16, 0)
        settings: dict[str, Any] = {"logprobs": None, "echo": False, "caller": NOBODY}
        texts = [wish.text(model, Prompt("!", [1]), choice, **settings) for choice in range(3)]
        job = Job(texts, Caller("x", 0.0, lambda *given: told.append(given)))
        token, end = NewToken(5, "!", None), NewToken(-1, "", None)
        job.deliver([Update(2, [end], True)])
        for later in (1.0, 3.0):
            now = later
            job.deliver([Update(place, [token], False) for place in (0, 1)])
        now = 7.0
        job.deliver([Update(0, [token, token, end], True), Update(1, [end], True)])

    asyncio.run(deliver())
    assert told == [(1.0, 1, True), (2.0, 1, False), (2.0, 1, False), (4.0, 2, False)]


def test_what_is_refused_before_the_routes_is_counted(state: State) -> None:
    given = {"key": "right", "headers": {"authorization": "Bearer right"}}
    for status, method, path, settings in (
        (401, "POST", COMPLETIONS, {"key": "right"}),
        (403, "POST", COMPLETIONS, {**given, "headers": {"host": "evil.example"}}),
        (413, "POST", COMPLETIONS, {**given, "content": b" " * (10**6 + 1)}),
        (401, "GET", "/v1/models/any", {"key": "right"}),
        (200, "GET", "/v1/models", given),
    ):
        assert ask(state, method, path, **settings).status_code == status
    lines = [line for line in state.metrics.text().decode().splitlines() if "requests_total{" in line]
    assert sorted(lines) == [
        f'jaxgpt_requests_total{{route="{route}",status="{status}"}} 1.0'
        for route, status in ((COMPLETIONS, 401), (COMPLETIONS, 403), (COMPLETIONS, 413), ("other", 401))
    ]


def test_metrics_tell_what_a_request_took(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.metrics.observe(list(state.models.values()))

    def figures() -> dict[str, float]:
        lines = ask(state, "GET", "/metrics").text.splitlines()
        named = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name.removeprefix("jaxgpt_"): float(value) for name, _, value in named}

    def of_model(name: str) -> str:
        return f'{name}{{model="small"}}'

    before, began = figures(), time.perf_counter()
    usage = complete(state, prompt="def mean(values):", max_tokens=9, temperature=0).json()["usage"]
    passed, after = time.perf_counter() - began, figures()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    tokens = {name: grown[of_model(f"{name}_tokens_total")] for name in ("prompt", "cached", "new")}
    assert tokens["new"] == usage["completion_tokens"] == 9
    assert tokens["prompt"] + tokens["cached"] == usage["prompt_tokens"] > 0
    assert 0 < grown[of_model("steps_total")] <= tokens["prompt"] + tokens["new"]
    assert grown[f'requests_total{{route="{COMPLETIONS}",status="200"}}'] == 1
    assert grown["first_token_seconds_count"] == 1
    assert 1 <= grown["between_tokens_seconds_count"] <= 8  # tokens of one step are told together
    for name in ("first_token", "between_tokens"):
        assert 0 < grown[f"{name}_seconds_sum"] < passed
        assert grown[f'{name}_seconds_bucket{{le="+Inf"}}'] == grown[f"{name}_seconds_count"]
    assert (after[of_model("running")], after[of_model("waiting")], after[of_model("slots")]) == (0, 0, 4)
    assert after[of_model("cache_bytes")] == state.models["small"].scheduler.pool.kept_bytes
    state.metrics.on_tokens(8.0, 1, True)
    state.metrics.on_tokens(6.0, 4, False)
    monkeypatch.setattr(Worker, "load", (3, 7))
    busy = figures()
    assert (busy[of_model("running")], busy[of_model("waiting")]) == (3, 7)
    sums = [busy[name] - after[name] for name in ("first_token_seconds_sum", "between_tokens_seconds_sum")]
    assert sums == pytest.approx([8.0, 6.0 / 4])  # the second is a token's share


def test_offsets_are_those_in_the_text_that_is_returned(state: State, model: ServedModel) -> None:
    tokenizer = model.tokenizer
    tokens = [tokenizer.endoftext, *tokenizer.encode("ab"), tokenizer.endoftext, *tokenizer.encode("c")]
    as_text = "ab<|endoftext|>c"
    for prompt, names in ((tokens, ["", "a", "b", "", "c"]), (as_text, ["a", "b", "<|endoftext|>", "c"])):
        answer = complete(state, prompt=prompt, echo=True, logprobs=0, max_tokens=2)
        (choice,) = answer.json()["choices"]
        offsets = choice["logprobs"]["text_offset"][: len(names) + 1]
        assert [choice["text"][a:b] for a, b in itertools.pairwise(offsets)] == names


def test_what_a_stop_text_holds_back_moves_no_offset(state: State) -> None:
    plain = {"prompt": "def mean(values):", "logprobs": 0, "max_tokens": 24, "temperature": 0, "seed": 1}
    (free,) = complete(state, **plain).json()["choices"]
    beginnings = [free["text"][at : at + 6] + "\u2603" for at in range(0, 12, 3)]  # none of them comes
    (held,) = complete(state, **plain, stop=beginnings).json()["choices"]
    assert held["text"] == free["text"]
    assert held["logprobs"]["text_offset"] == free["logprobs"]["text_offset"]
    starts = [offset - len(str(plain["prompt"])) for offset in held["logprobs"]["text_offset"]]
    assert starts[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(starts))


def test_fields_that_are_wrong_are_named(state: State, model: ServedModel, folder: Path) -> None:
    bias = complete(state, prompt="a", logit_bias={"5": "a"}).json()["error"]
    assert (bias["param"], "for token 5" in bias["message"]) == ("logit_bias", True)
    talking = dataclasses.replace(
        model, chat_template=ChatTemplate("{{ raise_exception(messages[0].role) }}", folder)
    )
    talking_state = dataclasses.replace(state, models={"small": talking})
    said = {"messages": [{"role": "\ud800", "content": "x"}]}
    refused = ask(talking_state, "POST", CHAT, content=json.dumps(said))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "template_error")
    refused = ask(talking_state, "POST", CHAT, content=json.dumps({**said, "top_logprobs": 3}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    echoing = dataclasses.replace(model, chat_template=ChatTemplate("{{ messages[0].content }}", folder))
    long = {"messages": [{"role": "user", "content": "a " * 10_000}]}
    refused = ask(dataclasses.replace(state, models={"small": echoing}), "POST", CHAT, json=long)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_special_tokens_go_to_text_and_back(state: State, model: ServedModel) -> None:
    tokens = ask(state, "POST", "/tokenize", json={"content": "a<|endoftext|>b"}).json()["tokens"]
    assert model.tokenizer.endoftext in tokens
    assert ask(state, "POST", "/detokenize", json={"tokens": tokens}).json()["content"] == "a<|endoftext|>b"


def test_a_module_whose_bits_depend_on_a_step_s_size_shares_nothing(folder: Path) -> None:
    limits = Limits(4, 8, 0.0, 10**6, 10**6)
    model = open_served_model("small", folder, limits, "torch", 1, "auto", 8)
    try:
        assert not model.scheduler.pool.keeps
        assert model.draft_tokens == 0
    finally:
        model.worker.stop()


def test_a_module_computes_the_head_of_the_last_token_alone_where_no_other_is_wanted(folder: Path) -> None:
    class Counted(TorchSession):
        rows = 0

        def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
            logits = super().forward(tokens, all_logits=all_logits)
            self.rows = len(logits)
            return logits

    session = Counted(build_model(read_artifact(folder)))
    slot, tokens = OneSlot(session), [3, 1, 4, 1, 5]
    after_last = session.prefill(tokens)
    after_each = np.concatenate([session.prefill(tokens[: count + 1])[None] for count in range(5)])
    for wanted, rows in (("00001", 1), ("00000", 1), ("01000", 5), ("10001", 5), ("11111", 5)):
        slot.truncate(0, 0)
        chosen = np.array([digit == "1" for digit in wanted])
        logits = slot.forward(tokens, [0] * 5, wanted=chosen)
        assert session.rows == rows
        assert logits.shape == (chosen.sum(), after_each.shape[1])
        np.testing.assert_allclose(logits, after_each[chosen], atol=HEADS_ROUNDING)
        if wanted == "00001":
            assert logits[0].tobytes() == after_last.tobytes()  # as `generate` has them


def test_numbers_that_the_engine_does_not_have_are_one_line(command: Command, folder: Path) -> None:
    call = ("jaxgpt-export", "serve", "--artifact", folder, "--max-running", 3_000_000_000)
    assert_one_line_error(command(*call), "--max-running is 3000000000, expected at most 65536")
    call = ("jaxgpt-export", "serve", "--artifact", folder, "--api-key", " \n")
    assert_one_line_error(command(*call), "--api-key is empty")


def test_a_key_that_no_header_carries_is_one_line_that_does_not_tell_it(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("jaxgpt-export", "serve", "--artifact", folder, "--port", -1)  # which is looked at later
    for key in ("schlüssel", "of two\nlines"):
        done = command(*call, "--api-key", key)
        assert_one_line_error(done, "--api-key can't be sent in a header", "printable ASCII", "another key")
        assert key not in done[2]
    monkeypatch.setenv("JAXGPT_API_KEY", "キー")
    assert_one_line_error(command(*call), "JAXGPT_API_KEY can't be sent", "character 1 is")


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(
    state: State, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(name.encode()) for name in model.tokenizer.vocab())  # <|endoftext|>
    assert model.tokenizer.longest_token == longest == 13
    fits = complete(state, prompt="<|endoftext|>" * model.block_size, max_tokens=1)
    assert fits.json()["usage"]["prompt_tokens"] == model.block_size
    monkeypatch.setattr(model.tokenizer, "encode", None)
    error = complete(state, prompt="!" * (13 * model.block_size + 1)).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert f"context holds {model.block_size} tokens" in error["message"]


def test_a_long_request_is_read_in_a_thread(
    state: State, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encode = [], model.tokenizer.encode

    def noting(text: str, special: bool = False) -> list[int]:
        threads.append(threading.get_ident())
        state.draining = len(threads) == 3
        return encode(text, special)

    monkeypatch.setattr(model.tokenizer, "encode", noting)
    statuses = [
        ask(state, "POST", "/tokenize", json={"content": "!" * count}).status_code
        for count in (LONG_BODY // 2, LONG_BODY, LONG_BODY)
    ]
    assert [thread == threading.get_ident() for thread in threads] == [True, False, False]
    assert statuses == [200, 200, 503]  # the last one when the server began to end


def test_a_long_request_that_waits_to_be_read_is_told_that_the_server_ends(state: State) -> None:
    busy = threading.Event()
    READER.submit(busy.wait, SECONDS)
    app = build_app(state, Rules("127.0.0.1", None, (), 10**6))

    async def end() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=SECONDS) as client:
            wish = {"prompt": "!" * LONG_BODY}
            asked = asyncio.create_task(client.post(f"http://127.0.0.1{COMPLETIONS}", json=wish))
            while all(isinstance(reading, asyncio.Task) for reading in state.reading):  # its body
                await asyncio.sleep(0.01)
            await drain(state)
            return await asked

    try:
        answer = asyncio.run(end())
    finally:
        busy.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


def test_an_answer_in_one_piece_reads_its_updates_once(model: ServedModel) -> None:
    class Once(list[Update]):
        def __iter__(self) -> Iterator[Update]:
            walks.append(self)
            return super().__iter__()

    async def whole(reply: CompletionReply | ChatReply) -> list[Any]:
        wish = read_wish(Fields({}), model, 16, 0)
        settings: dict[str, Any] = {"logprobs": None, "echo": False, "caller": NOBODY}
        job = Job([wish.text(model, Prompt("!", [1]), n, **settings) for n in range(3)], NOBODY)
        updates = Once(
            Update(place, [NewToken(5, word, None)], False) for word in ("a", "b") for place in (2, 0)
        )
        choices = reply.whole(job, updates)["choices"]
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]

    for reply in (
        CompletionReply(model, [Prompt("!", [1])], 3, False, False, False),
        ChatReply(model, False, False),
    ):
        walks: list[Once] = []
        assert asyncio.run(whole(reply)) == ["ab", "", "ab"]
        assert len(walks) == 1


def test_another_method_is_told_which_is_allowed(state: State) -> None:
    assert ask(state, "GET", COMPLETIONS).headers["allow"] == "POST"
    assert {*ask(state, "POST", "/health").headers["allow"].split(", ")} == {"GET", "HEAD"}


def test_pages_are_named_as_browsers_send_them_or_refused() -> None:
    for given, origin in (
        ("https://Page.example/", "https://page.example"),
        ("https://page.example:443", "https://page.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("*", "*"),
        ("null", "null"),
    ):
        assert _origin(given) == origin
    for given in ("https://page.example/app", "page.example", "https://me@page.example", "https://", ""):
        with pytest.raises(UserError, match=r"is no origin, expected one such as https://example\.com"):
            _origin(given)
