import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Command, assert_one_line_error

from jaxgpt.training.flax_session import FlaxSession
from jaxgpt.training.model.params import graph_of, merge
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import open_run

PROMPT = "Write a function to add the total by the"


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
def test_engine_gives_the_logits_of_the_whole_text(run: Path, length: int) -> None:
    opened = open_run(run)
    config = opened.config.model
    _, params = load_params(opened, "best")
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=64).tolist()
    expected = np.asarray(merge(graph_of(config), params)(jnp.asarray([tokens])))[0]
    engine = FlaxSession(config, params)
    found = [engine.prefill(tokens[:length]), *(engine.decode(token) for token in tokens[length:])]
    # float32; a cached sum runs over the padded context in another order.
    assert np.abs(np.stack(found) - expected[length - 1 :]).max() < 1e-4


def test_same_seed_gives_the_same_text_and_greedy_needs_none(command: Command, run: Path) -> None:
    def text(*more: object) -> str:
        code, out, _ = command(
            "jaxgpt", "sample", "--run", run, "--prompt", PROMPT, "--max-new-tokens", 20, *more
        )
        assert code == 0
        return out

    assert text("--seed", 3) == text("--seed", 3)
    assert text("--seed", 3) != text("--seed", 4)
    assert text("--temperature", 0, "--seed", 3) == text("--temperature", 0, "--seed", 4)


def test_text_on_stdout_is_the_text_in_the_json(command: Command, run: Path) -> None:
    arguments = ("--run", run, "--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 0)
    shown = command("jaxgpt", "sample", *arguments)[1]
    figures = json.loads(command("jaxgpt", "sample", *arguments, "--json")[1])
    assert shown == figures["text"] + "\n"
    assert len(figures["tokens"]) == 20
    assert figures["finish_reason"] == "length"


def test_full_context_ends_the_text_with_its_reason(command: Command, run: Path) -> None:
    arguments = ("--run", run, "--prompt", PROMPT, "--max-new-tokens", 500, "--temperature", 0, "--json")
    figures = json.loads(command("jaxgpt", "sample", *arguments)[1])
    prompt = open_run(run).tokenizer.encode(PROMPT)
    assert figures["finish_reason"] in ("context", "endoftext")
    if figures["finish_reason"] == "context":
        assert len(prompt) + len(figures["tokens"]) == 65  # the last token needs no place


def test_prompt_longer_than_the_context_is_one_line(command: Command, run: Path) -> None:
    result = command("jaxgpt", "sample", "--run", run, "--prompt", "xyz " * 200)
    assert_one_line_error(result, "tokens", "context holds 64")
