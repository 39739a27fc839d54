"""Penalties of repetition: transformers' processors, to the bit; and in every way that text is generated."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.generation.open_session import open_session
from jaxgpt_export.llm import LLM
from jaxgpt_export.native.library import instruction_sets
from serving import serving
from small_gpt2 import gpt2, run_import, save, small_tokenizer
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from jaxgpt.generation.generate import generate
from jaxgpt.generation.repetition import LEAST_LOGIT, penalize_repetition
from jaxgpt.generation.sampling import LARGEST_PENALTY, Sampling, draw_token
from jaxgpt.shared.errors import UserError

PROMPT = "Write a function to add the total by the"
VOCAB = 50

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")


def by_transformers(
    logits: npt.NDArray[np.float32], tokens: Sequence[int], penalty: float, size: int
) -> npt.NDArray[np.float32]:
    """Return what transformers makes of logits, its minus infinity as the least float32."""
    ids, scores = torch.tensor([tokens]), torch.from_numpy(logits[None].copy())
    if penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if size:
        scores = NoRepeatNGramLogitsProcessor(size)(ids, scores)
    return np.maximum(scores[0].numpy(), np.float32(LEAST_LOGIT))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 40])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
def test_logits_are_those_of_transformers_to_the_bit(penalty: float, size: int) -> None:
    random = np.random.default_rng(size)
    for length in (1, 2, 3, 30, 200):
        tokens = random.integers(0, 4 if length == 30 else VOCAB, length).tolist()
        logits = (3 * random.standard_normal(VOCAB)).astype(np.float32)
        before = logits.copy()
        sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size)
        found = penalize_repetition(logits, tokens, sampling)
        np.testing.assert_array_equal(found, by_transformers(logits, tokens, penalty, size))
        np.testing.assert_array_equal(logits, before)


def test_a_token_that_would_repeat_a_run_is_never_drawn_and_one_is_drawn_where_all_would() -> None:
    sampling = Sampling(temperature=1.0, no_repeat_ngram_size=1)
    logits = np.array([9.0, 0.0, -9.0], np.float32)
    left = penalize_repetition(logits, [0, 2], sampling)
    assert {draw_token(left, sampling, uniform) for uniform in np.linspace(0, 1 - 2.0**-53, 99)} == {1}
    none_left = penalize_repetition(logits, [0, 1, 2], sampling)
    assert draw_token(none_left, sampling, 0.5) in (0, 1, 2)


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 2 * LARGEST_PENALTY},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": -(10**5000)},
    ],
)
def test_impossible_settings_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=needs_engine)])
@pytest.mark.parametrize("settings", [(1.3, 0), (1.0, 2), (1.2, 3)])
def test_a_greedy_text_is_the_one_that_transformers_generates(
    command: Command, tmp_path: Path, engine: str, settings: tuple[float, int]
) -> None:
    """Random weights whose logits differ by far more than float32's order of sums can change them."""
    tokenizer = small_tokenizer()
    model = gpt2(tokenizer.vocab_size)
    run_import(command, save(model, tokenizer, tmp_path / "hf"), tmp_path / "a")
    penalty, size = settings
    session, _ = open_session(read_artifact(tmp_path / "a"), engine, 1)
    prompt = tokenizer.encode(PROMPT)[:4]
    again = functools.partial(generate, session, tokenizer, tokenizer.decode(prompt), 12)
    found = again(Sampling(0.0, repetition_penalty=penalty, no_repeat_ngram_size=size))
    asked = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": penalty}
    inputs = torch.tensor([prompt])
    expected = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), no_repeat_ngram_size=size, pad_token_id=0, **asked
    )
    assert found.tokens == expected[0, len(prompt) :].tolist()
    assert found.tokens != again(Sampling(0.0)).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_way_to_generate_gives_the_same_text(
    command: Command, int8_dynamic: Path, temperature: float
) -> None:
    llm = LLM.load(int8_dynamic)
    asked = {"temperature": temperature, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    text = llm.generate(PROMPT, max_new_tokens=30, seed=3, **asked)  # type: ignore[call-overload]
    plain = llm.generate(PROMPT, max_new_tokens=30, seed=3, temperature=temperature)
    assert text != plain
    assert "".join(llm.stream(PROMPT, max_new_tokens=30, seed=3, **asked)) == text  # type: ignore[arg-type]
    both = llm.generate([PROMPT, "def"], max_new_tokens=30, seed=3, **asked)  # type: ignore[call-overload]
    assert both[0] == text
    options = ("--repetition-penalty", 1.5, "--no-repeat-ngram-size", 3, "--temperature", temperature)
    call = ("jaxgpt-export", "generate", "--artifact", int8_dynamic, "--prompt", PROMPT, "--seed", 3)
    assert command(*call, "--max-new-tokens", 30, *options)[1] == text + "\n"
    assert_one_line_error(command(*call, *options, "--draft-tokens", 4), "--draft-tokens is for text without")
    torch_text = command(*call, "--max-new-tokens", 30, *options, "--engine", "torch")[1]
    assert torch_text == text + "\n"
    if not instruction_sets():
        return
    wish = {"prompt": PROMPT, "max_tokens": 30, "seed": 3, "temperature": temperature, "min_p": 0.05}
    with serving("--artifact", int8_dynamic) as server:
        penalties = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
        scored = server.complete(**wish, **penalties, logprobs=1)["choices"][0]
        assert server.complete(**wish, **penalties)["choices"][0]["text"] == text == scored["text"]
        assert server.complete(**wish)["choices"][0]["text"] == plain


@needs_engine
def test_what_the_server_refuses(int8_dynamic: Path) -> None:
    with serving("--artifact", int8_dynamic) as server:
        for name, value in (("repetition_penalty", 0), ("no_repeat_ngram_size", -1)):
            answer = server.post("/v1/completions", {"prompt": "a", name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
