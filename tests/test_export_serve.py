"""`jaxgpt-export serve`: the API that OpenAI's clients speak, over the same texts as `generate`."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from jaxgpt_export.llm import LLM
from jaxgpt_export.native.library import instruction_sets
from serving import SECONDS, Served, serving

from jaxgpt.generation.scoring import score, tops_of_rows
from jaxgpt.generation.session import ScoringSession

PROMPT = "Write a function to add the total by the"

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")


@pytest.fixture(scope="module")
def server(int8_dynamic: Path) -> Iterator[Served]:
    limits = ("--max-running", 3, "--max-waiting", 9, "--max-body-mb", 1)
    with serving("--artifact", f"small={int8_dynamic}", *limits) as served:
        yield served


@pytest.fixture(scope="module")
def llm(int8_dynamic: Path) -> LLM:
    return LLM.load(int8_dynamic)


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0)


def test_a_completion_is_what_generate_writes(client: openai.OpenAI, llm: LLM) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}):
        answer = client.completions.create(model="small", prompt=PROMPT, max_tokens=20, **settings)  # type: ignore[call-overload]
        text = llm.generate(PROMPT, max_new_tokens=20, min_p=0.0, **settings)  # type: ignore[arg-type]
        assert answer.choices[0].text == text  # the server, as OpenAI's, leaves no token out by itself
        assert answer.usage.prompt_tokens == len(llm.tokenizer.encode(PROMPT))
        assert answer.usage.completion_tokens == 20
        assert answer.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_text_and_ends_to_the_letter(server: Served, llm: LLM) -> None:
    wish = {"prompt": PROMPT, "max_tokens": 15, "seed": 3, "temperature": 0.8, "min_p": 0.05}
    *events, reason, usage = server.events(**wish, stream_options={"include_usage": True})
    assert "".join(event["choices"][0]["text"] for event in events) == llm.generate(
        PROMPT, max_new_tokens=15, seed=3
    )
    assert all(event["choices"][0]["finish_reason"] is None and event["usage"] is None for event in events)
    assert len(events) > 5
    assert reason["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 15
    assert all(event["object"] == "text_completion" and event["model"] == "small" for event in events)


def test_choices_differ_and_repeat_with_a_seed(client: openai.OpenAI) -> None:
    def texts() -> list[str]:
        prompts = [PROMPT, "return"]
        answer = client.completions.create(model="small", prompt=prompts, max_tokens=12, n=2, seed=7)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 48
        return [choice.text for choice in answer.choices]

    assert texts() == texts()
    assert len(set(texts())) == 4


def test_a_stop_text_is_not_shown_in_part(client: openai.OpenAI, llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_new_tokens=40, temperature=0.0)
    stop = whole[10:14]
    stream = client.completions.create(
        model="small",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0,
        stop=[stop, "#1", "#2", "#3", "#4"],
        stream=True,
    )
    pieces = [event.choices[0].text for event in stream]
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert all(whole.startswith("".join(pieces[:i])) for i in range(len(pieces)))


def test_the_four_forms_of_a_prompt_give_one_text(server: Served, llm: LLM) -> None:
    tokens = llm.tokenizer.encode(PROMPT)
    forms: tuple[object, ...] = (PROMPT, [PROMPT], tokens, [tokens])
    texts = {server.complete(prompt=form, temperature=0)["choices"][0]["text"] for form in forms}
    assert len(texts) == 1
    assert server.complete(prompt="", temperature=0)["usage"]["prompt_tokens"] == 1


def test_null_and_unknown_fields_are_as_good_as_none(server: Served) -> None:
    plain = server.complete(prompt=PROMPT, temperature=0)
    odd = {"model": "", "stop": None, "n": None, "suffix": None, "logit_bias": None, "user": "u", "foo": [1]}
    assert server.complete(prompt=PROMPT, temperature=0, **odd)["choices"] == plain["choices"]
    assert plain["usage"]["completion_tokens"] == 16  # OpenAI's default


@needs_engine
def test_echoed_log_probabilities_are_those_of_the_engine_s_logits(server: Served, llm: LLM) -> None:
    # What lm-eval posts: a list of token lists, greedy, one token more, echo.
    texts = [PROMPT, "def f(x):\n    return x"]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = server.complete(model="small", prompt=prompts, **body)
    for choice, tokens in zip(answer["choices"], prompts, strict=True):
        told = choice["logprobs"]
        session = llm._model.new_session(1)
        assert isinstance(session, ScoringSession)
        logits = session.forward(tokens, all_logits=True)
        right = [
            score(row, top, token, 0).logprob
            for row, top, token in zip(logits, tops_of_rows(session, logits, 1), tokens[1:], strict=False)
        ]
        exact = logits[:-1].astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(right, exact[np.arange(len(right)), tokens[1:]], rtol=0, atol=1e-12)
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == right  # to the bit
        assert len(told["tokens"]) == len(tokens) + 1
        for place, row in enumerate(logits[:-1]):
            likely = max(told["top_logprobs"][place + 1].values())
            greedy = told["token_logprobs"][place + 1] == likely
            assert greedy == (int(row.argmax()) == tokens[place + 1])
        assert "".join(told["tokens"]).startswith(llm.tokenizer.decode(tokens))
        offsets = told["text_offset"]
        assert [choice["text"][a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == told[
            "tokens"
        ]


def test_log_probabilities_are_the_same_streamed_with_cached_prompts_and_beside_others(
    server: Served,
) -> None:
    wish = {"prompt": PROMPT * 3, "max_tokens": 8, "logprobs": 3, "seed": 1, "echo": True}
    alone = server.complete(**wish)["choices"][0]["logprobs"]

    async def all_at_once() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=SECONDS) as http:
            posts = [http.post(f"{server.address}/v1/completions", json=wish) for _ in range(5)]
            return [answer.json()["choices"][0]["logprobs"] for answer in await asyncio.gather(*posts)]

    assert asyncio.run(all_at_once()) == [alone] * 5
    events = server.events(**wish)
    for name in ("token_logprobs", "top_logprobs", "text_offset", "tokens"):
        streamed = [value for event in events[:-1] for value in event["choices"][0]["logprobs"][name]]
        assert streamed == alone[name]


def test_tokens_that_are_no_whole_character_have_names_of_their_own(server: Served, llm: LLM) -> None:
    tokens = llm.tokenizer.encode("日本")
    assert len(tokens) > 2
    told = server.complete(prompt=tokens, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    names = [name for name in told["tokens"] if name.startswith("bytes:\\x")]
    content = b"".join(bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) for name in names)
    assert content.decode() == "日本"


@needs_engine
def test_a_repeated_prompt_is_taken_from_the_cache_and_gives_the_same(server: Served) -> None:
    prompt = "def mean(values):\n    " * 4
    first = server.complete(prompt=prompt, max_tokens=8, temperature=0)
    again = server.complete(prompt=prompt, max_tokens=8, temperature=0)
    assert first["choices"] == again["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1


def test_bias_penalties_and_min_p_change_what_is_drawn(server: Served, llm: LLM) -> None:
    plain = server.complete(prompt=PROMPT, temperature=0, max_tokens=10)["choices"][0]
    first = llm.tokenizer.encode(plain["text"])[0]
    banned = server.complete(prompt=PROMPT, temperature=0, max_tokens=10, logit_bias={str(first): -100})
    assert banned["choices"][0]["text"] != plain["text"]
    tokens = server.complete(
        prompt=PROMPT, temperature=0, max_tokens=10, frequency_penalty=2, presence_penalty=2, logprobs=0
    )["choices"][0]["logprobs"]["tokens"]
    assert len(set(tokens)) == 10
    sure = server.complete(prompt=PROMPT, temperature=1, min_p=1.0, max_tokens=10)["choices"][0]
    assert sure["text"] == plain["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a " * 5000}, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 65}, "stop"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"prompt": "a", "stream": 1}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "seed": 0.5}, "seed"),
        ({"prompt": "a", "model": 5}, "model"),
    ],
)
def test_a_wrong_field_is_named(server: Served, body: dict[str, object], param: str) -> None:
    content = json.dumps(body).encode()
    answer = httpx.post(f"{server.address}/v1/completions", content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert "\n" not in error["message"]


def test_errors_have_the_shape_and_status_that_clients_know(server: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context holds"):
        client.completions.create(model="small", prompt="a " * 3000)
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
    ):
        answer = httpx.request(method, f"{server.address}{path}")
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for content in (b"", b"{", b"[1]", b"NaN", b"\xff", b'{"prompt":' + b"[" * 100_000):
        answer = httpx.post(f"{server.address}/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    large = httpx.post(f"{server.address}/v1/completions", content=b" " * 2**20 + b"{}")
    assert large.status_code == 413
    chunks = httpx.post(f"{server.address}/v1/completions", content=(b" " * 2**16 for _ in range(20)))
    assert chunks.status_code == 413


def test_a_model_without_a_chat_template_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "Hi"}])


def test_models_say_what_they_are_and_no_path(
    server: Served, client: openai.OpenAI, int8_dynamic: Path
) -> None:
    (model,) = client.models.list().data
    told = model.to_dict()
    assert told["id"] == "small"
    assert told["method"] == "int8-dynamic"
    certificate = json.loads((int8_dynamic / "certificate.json").read_text())
    assert told["sha256"] == certificate["files"]["model.safetensors"]
    assert told["certificate"]["kl_mean"] == certificate["parity"]["kl_mean"]  # type: ignore[index]
    assert "/" not in json.dumps(told)
    assert client.models.retrieve("small").id == "small"


def test_tokenize_and_back_in_both_forms(server: Served, llm: LLM) -> None:
    text = "return 日<|endoftext|>x"
    tokens = llm.tokenizer.encode(text, special=True)
    for body in ({"content": text}, {"prompt": text, "add_special_tokens": False}):
        assert server.post("/tokenize", body).json()["tokens"] == tokens
    text = "def f():\n\treturn '日本'"
    back = server.post("/detokenize", {"tokens": llm.tokenizer.encode(text)}).json()
    assert back["content"] == back["prompt"] == text
    info = httpx.get(f"{server.address}/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [-1]}).status_code == 400


def test_a_page_of_another_origin_and_another_host_are_refused(server: Served) -> None:
    body = {"prompt": "a"}
    assert server.post("/v1/completions", body, host="evil.example").status_code == 403
    assert server.post("/v1/completions", body, origin="https://evil.example").status_code == 403
    assert server.post("/v1/completions", body, origin="null").status_code == 403
    assert server.post("/v1/completions", body, origin=server.address).status_code == 200
    form = httpx.post(
        f"{server.address}/v1/completions", content=json.dumps(body), headers={"content-type": "text/plain"}
    )
    assert form.status_code == 403
    assert "access-control-allow-origin" not in form.headers
