"""`jaxgpt-bench serving`: it starts our server, asks it and another one, and says what it found."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.provenance import provenance
from jaxgpt_bench.common.rows import Spread
from jaxgpt_bench.serving.client import Streamed
from jaxgpt_bench.serving.command import serving as serving_command
from jaxgpt_bench.serving.measure import SETTINGS, _body, _long_prompts, measure
from jaxgpt_bench.serving.options import ServingOptions
from jaxgpt_bench.serving.page import markdown_block
from jaxgpt_bench.serving.plot import serving_svg
from jaxgpt_bench.serving.rows import LoadRow, PromptRow, ServingFigures
from jaxgpt_export.native.library import instruction_sets
from serving import serving

from jaxgpt.shared.errors import UserError


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_servers_are_measured_side_by_side(command: Command, int8_dynamic: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    few = ("--clients", 1, 3, "--temperature", 0, "--tokens", 10, "--rounds", 2, "--long-prompt", 0)
    few += ("--shared-tokens", 30)
    with serving("--artifact", int8_dynamic) as other:
        arguments = ("--artifact", int8_dynamic, "--url", f"other={other.address}", "--out", out)
        code, _, err = command("jaxgpt-bench", "serving", *arguments, *few)
    assert code == 0, err
    figures = ServingFigures.from_json(json.loads(out.read_text()))
    assert [(row.server, row.clients, row.shared_tokens) for row in figures.load] == [
        (server, clients, shared)
        for shared in (0, 30)
        for clients in (1, 3)
        for server in ("jaxgpt", "other")
    ]
    assert all(row.tokens_per_s.min > 0 and row.first_token_ms.min > 0 for row in figures.load)
    assert figures.alone_tokens_per_s is not None
    assert figures.noise is not None
    assert figures.noise.probe_spread is not None
    assert "tokens/s" in err
    text = markdown_block(figures)
    assert "3 clients" not in text  # of 8 it speaks where 8 were measured
    assert text.count("| other | 3 |") == 2
    for suffix, begin in ((".svg", b"<svg"), (".png", b"\x89PNG")):
        assert out.with_suffix(suffix).read_bytes().startswith(begin)
    drawn = out.with_suffix(".svg").read_text()
    assert "tokens/s, all clients together" in drawn
    assert drawn == serving_svg(figures)


def row(server: str, clients: int, rate: float, shared: int = 0) -> LoadRow:
    spread = Spread.of([float(rate)])
    return LoadRow(
        server=server,
        clients=clients,
        temperature=0.0,
        tokens_per_s=spread,
        first_token_ms=spread,
        first_token_p99_ms=1.0,
        between_tokens_ms=1.0,
        between_tokens_p99_ms=1.0,
        client_cpu_share=0.0,
        shared_tokens=shared,
    )


def test_the_page_says_what_many_clients_get_beside_one_and_beside_others() -> None:
    rows = (row("jaxgpt", 1, 100), row("jaxgpt", 8, 400), row("jaxgpt", 8, 999, 30), row("llama", 8, 160))
    settings = {"preset": "gpt2", "prompt_tokens": 16, "tokens": 128, "rounds": 5}
    quiet, busy, first = Spread.of([4.0]), Spread.of([10.0]), Spread.of([200.0])
    prompt = PromptRow(
        server="jaxgpt", prompt_tokens=512, first_ms=first, again_ms=busy, quiet_ms=quiet, busy_p99_ms=busy
    )
    figures = ServingFigures(
        alone_tokens_per_s=Spread.of([125.0]),
        load=rows,
        prompts=(prompt,),
        settings=settings,
        **vars(provenance()),
    )
    text = markdown_block(figures)
    assert "first token after 200 ms, and after 10 ms when it comes again" in text
    assert "2.5 times their median in the quiet" in text
    assert "One client gets 80% of the 125 tokens/s" in text
    assert (
        "Greedy, 8 clients together get 4.0 times as much as one, 2.50 times what llama gives them." in text
    )


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_another_program_that_does_not_serve_is_one_line(
    command: Command, int8_dynamic: Path, fp32: Path, tmp_path: Path
) -> None:
    asked = ("jaxgpt-bench", "serving", "--artifact", int8_dynamic)
    assert_one_line_error(command(*asked, "--llama-server", "x"), "--parent")
    asked += ("--parent", fp32)
    assert_one_line_error(command(*asked, "--llama-server", tmp_path / "no"), "can't be started")
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    program.chmod(0o755)
    asked += ("--tokens", 16)  # the model's context is short
    assert_one_line_error(command(*asked, "--llama-server", program), "did not start", "no such option")


def test_times_between_tokens_are_shared_by_those_that_come_at_once() -> None:
    streamed = Streamed(1.0, [(1.5, 1), (1.7, 2), (1.8, 1)])
    assert streamed.first_s == 0.5
    assert streamed.gaps == pytest.approx([0.1, 0.1, 0.1])


def test_a_short_context_bounds_what_is_asked() -> None:
    options = ServingOptions(tokens=128, prompt_tokens=16)
    assert options.fitted(1024) == options
    found = options.fitted(256)
    assert (found.shared_tokens, found.long_prompt) == (112, 246)


def test_all_servers_are_told_to_draw_from_all_tokens() -> None:
    found = _body([1, 2], 3, 0.8, 7)
    assert (found["top_k"], found["top_p"], found["min_p"], found["seed"]) == (0, 1.0, 0.0, 7)
    assert "top_k" not in _body([1], 3, 0.0)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Let a server answer that takes so many seconds for a text, so many of whose tokens come at once.

    By its clock the texts' tokens come every 10 ms, but for a second in which the long prompt is read.
    """

    def replace(seconds: float, tokens: int) -> None:
        clock = [0.0]
        monkeypatch.setattr("jaxgpt_bench.serving.measure.time.perf_counter", lambda: clock[0])

        async def answer(
            address: str, body: dict[str, Any], heard: Callable[[int], None] = lambda count: None
        ) -> Streamed:
            if body["max_tokens"] < 10:
                begun = clock[0]
                clock[0] += 0.5
                return Streamed(begun, [(clock[0], 1)])
            heard(tokens)
            await asyncio.sleep(seconds)
            times = [0.01 * k for k in range(100)] + [
                2.0 + 0.01 * k for k in range(100)
            ]  # waits 0.99 ... 2.0
            return Streamed(0.0, [(moment, 1) for moment in times])

        monkeypatch.setattr("jaxgpt_bench.serving.measure.stream", answer)

    return replace


LONG = ServingOptions(prompt_tokens=4, tokens=20, long_prompt=8)


@pytest.mark.parametrize("seconds", [0.9, 0.05])  # a small model's texts end soon
def test_a_wait_that_begins_before_a_long_prompt_comes_is_one_beside_it(
    answers: Callable[[float, int], None], seconds: float
) -> None:
    answers(seconds, 20)
    found = asyncio.run(_long_prompts(LONG, "", lambda count: [0] * count, 80))
    assert found is not None
    *_, quiet, busy = found
    assert quiet == pytest.approx(0.01)
    assert busy > 0.5


def test_long_prompts_without_room_beside_the_texts_are_left_out_in_a_line(
    answers: Callable[[float, int], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers(0.0, 1)  # they end when they have begun

    async def load(address: str, bodies: Any, clients: int) -> tuple[float, list[Streamed]]:
        return 1.0, [Streamed(0.0, [(0.5, 1)], 1) for _ in bodies]

    monkeypatch.setattr("jaxgpt_bench.serving.measure.load", load)
    options = ServingOptions(clients=(1,), temperature=(0.0,), tokens=20, shared_tokens=0, rounds=2)

    async def rounds() -> list[dict[str, Any]]:
        return [found async for found in measure(options, {"other": "http://127.0.0.1:9"}, None)]

    first, second = asyncio.run(rounds())
    assert [first["settings"]["rounds"], second["settings"]["rounds"]] == [1, 2]
    assert [len(found["load"]) for found in (first, second)] == [1, 1]
    assert second["prompts"] == ()
    assert capfd.readouterr().err.count("other: long prompts are left out") == 1


def test_a_round_is_written_before_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> AsyncIterator[dict[str, Any]]:
        settings = {name: getattr(ServingOptions(), name) for name in SETTINGS}
        yield {
            "alone_tokens_per_s": None,
            "load": (row("other", 1, 10),),
            "prompts": (),
            "settings": {**settings, "rounds": 1},
        }
        raise UserError("no server answers")

    monkeypatch.setattr("jaxgpt_bench.serving.measure.measure", fails)
    out = tmp_path / "serving.json"
    with pytest.raises(UserError, match="no server answers"):
        serving_command(ServingOptions(url=("other=http://127.0.0.1:9",), out=out))
    figures = ServingFigures.from_json(json.loads(out.read_text()))
    assert (figures.load[0].server, figures.settings["rounds"]) == ("other", 1)


def test_bad_options_are_one_line(command: Command, int8_dynamic: Path) -> None:
    assert_one_line_error(command("jaxgpt-bench", "serving"), "no server")
    for url in (
        "x",
        "=http://127.0.0.1:1",
        "x=http://127.0.0.1:80a",
        "x=http://127.0.0.1:99999",
        "x=http://",
    ):
        assert_one_line_error(command("jaxgpt-bench", "serving", "--url", url), "NAME=http://")
    twice = ("a=http://127.0.0.1:1", "a=http://127.0.0.1:2")
    for names in (("jaxgpt=http://127.0.0.1:1",), twice):
        assert_one_line_error(command("jaxgpt-bench", "serving", "--url", *names), "names another server")
    there = ("jaxgpt-bench", "serving", "--url", "other=http://127.0.0.1:9")
    code, _, err = command(*there)
    assert code == 2
    said = "no server answers at http://127.0.0.1:9 (Connection refused); start it first"
    assert said in err.splitlines()[-1]
    for options, part in {
        ("--clients", 0): "--clients has 0",
        ("--temperature", -1): "--temperature has -1",
        ("--llama-server", "x"): "--artifact",
        ("--parent", int8_dynamic): "--llama-server",
    }.items():
        assert_one_line_error(command(*there, *options), part)
    assert_one_line_error(
        command("jaxgpt-bench", "serving", "--artifact", int8_dynamic, "--tokens", 1000), "context of"
    )
    assert_one_line_error(
        command("jaxgpt-bench", "serving", "--artifact", int8_dynamic, "--temperature"), "--temperature"
    )
    assert_one_line_error(
        command("jaxgpt-bench", "serving", "--artifact", int8_dynamic, "--tokens", 0), "--tokens"
    )
