"""`LLM`: what it writes and scores is what the commands and the module do."""

import itertools
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, python
from jaxgpt_export.llm import LLM
from jaxgpt_export.model.build import load
from jaxgpt_export.native.library import instruction_sets
from test_export_generate import BLOCK
from waiting import join

from jaxgpt.shared.errors import UserError

PROMPT = "Write a function to add the total by the"
# From the same float32 logits, summed over the vocabulary in float64 in another order.
LOGPROB_TOLERANCE = 1e-9
# The native engine keeps keys and values in float16, the module here in float32: a part of INT8's own error.
CACHE_TOLERANCE = 0.05

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")


@pytest.fixture(scope="module")
def llm(int8_dynamic: Path) -> LLM:
    return LLM.load(int8_dynamic)


def test_generate_is_the_command_s_text(command: Command, llm: LLM, int8_dynamic: Path) -> None:
    arguments = ("--artifact", int8_dynamic, "--prompt", PROMPT, "--max-new-tokens", 20, "--seed", 3)
    out = command("jaxgpt-export", "generate", *arguments)[1]
    assert llm.generate(PROMPT, max_new_tokens=20, seed=3) + "\n" == out
    assert llm.generate(PROMPT, max_new_tokens=20, seed=4) + "\n" != out
    greedy = llm.generate(PROMPT, max_new_tokens=20, temperature=0.0)
    assert llm.generate(PROMPT, max_new_tokens=20, min_p=1.0, seed=4) == greedy


def test_texts_of_a_list_are_those_that_each_would_be_alone(llm: LLM) -> None:
    prompts = [PROMPT, "", "return", *(f"{PROMPT} case {i}" for i in range(9))]
    together = llm.generate(prompts, max_new_tokens=15, temperature=0.7, top_p=0.9, stop="\n")
    alone = [
        llm.generate(prompt, max_new_tokens=15, temperature=0.7, top_p=0.9, stop=["\n"]) for prompt in prompts
    ]
    assert together == alone
    assert llm.generate([]) == []


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_pieces_of_a_stream_are_the_text(llm: LLM, temperature: float) -> None:
    pieces = list(llm.stream(PROMPT, max_new_tokens=30, temperature=temperature))
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == llm.generate(PROMPT, max_new_tokens=30, temperature=temperature)


def test_two_streams_and_a_text_between_them_do_not_disturb_each_other(llm: LLM) -> None:
    first, second = llm.stream(PROMPT, max_new_tokens=20), llm.stream("def", max_new_tokens=20, seed=2)
    found: tuple[list[str], list[str]] = ([], [])
    for one, other in itertools.zip_longest(first, second, fillvalue=""):
        found[0].append(one)
        found[1].append(other)
        llm.generate("return", max_new_tokens=2)
    assert "".join(found[0]) == llm.generate(PROMPT, max_new_tokens=20)
    assert "".join(found[1]) == llm.generate("def", max_new_tokens=20, seed=2)


def test_threads_take_turns(llm: LLM) -> None:
    alone = [llm.generate(PROMPT, max_new_tokens=20, seed=seed) for seed in range(4)]
    found: dict[int, str] = {}

    def work(seed: int) -> None:
        found[seed] = llm.generate(PROMPT, max_new_tokens=20, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    join(*threads)
    assert [found[seed] for seed in range(4)] == alone


def module_logprobs(folder: Path, llm: LLM, text: str) -> np.ndarray:
    """The same by the module, all at once, with PyTorch's own log_softmax."""
    tokens = llm.tokenizer.encode(text)
    given = torch.tensor([[llm.tokenizer.endoftext, *tokens[:-1]]])
    with torch.no_grad():
        logits = load(folder)(given)[0].double()
    return torch.log_softmax(logits, -1)[range(len(tokens)), tokens].numpy()


@pytest.mark.parametrize("words", [1, 3, 20])
@pytest.mark.parametrize("engine", ["torch", pytest.param("auto", marks=needs_engine)])
def test_logprobs_of_float32_are_the_log_softmax_of_the_module(fp32: Path, engine: str, words: int) -> None:
    llm = LLM.load(fp32, engine=engine)
    text = "total " * words
    found = llm.logprobs(text)
    assert llm.engine.startswith("jaxgpt-torch" if engine == "torch" else "jaxgpt-native (")
    assert found.shape == (len(llm.tokenizer.encode(text)),)
    # In pieces of 64 positions with a cache, here all at once: float32 sums differ.
    assert np.abs(found - module_logprobs(fp32, llm, text)).max() < 1e-5


@needs_engine
def test_logprobs_of_the_native_engine_are_those_of_the_module(llm: LLM, int8_dynamic: Path) -> None:
    text = PROMPT + " count"
    found = llm.logprobs(text)
    assert llm.engine.startswith("jaxgpt-native")
    assert np.abs(found - module_logprobs(int8_dynamic, llm, text)).max() < CACHE_TOLERANCE
    exact = LLM.load(int8_dynamic, kv_cache="fp32")
    difference = np.abs(exact.logprobs(text) - module_logprobs(int8_dynamic, exact, text)).max()
    assert difference < LOGPROB_TOLERANCE


def test_scoring_leaves_the_next_text_alone(llm: LLM) -> None:
    before = llm.generate(PROMPT, max_new_tokens=10)
    llm.logprobs("return")
    assert llm.generate(PROMPT, max_new_tokens=10) == before
    assert llm.logprobs("").shape == (0,)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens (0)"),
        ({"temperature": -1.0}, "temperature (-1.0)"),
        ({"top_p": 2.0}, "top_p (2.0)"),
        ({"top_k": -1}, "top_k (-1)"),
        ({"min_p": 1.5}, "min_p (1.5)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty (0.0)"),
        ({"seed": -1}, "seed (-1)"),
    ],
)
def test_values_out_of_range_are_one_line_in_every_call(
    llm: LLM, settings: dict[str, float], part: str
) -> None:
    for call in (
        lambda: llm.generate("a", **settings),
        lambda: llm.generate(["a"], **settings),
        lambda: llm.stream("a", **settings),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["b'def'", "None", "3", "range(3)", "['a', None]", "{'a': 1}", "[b'x']"])
def test_what_is_no_text_is_one_line_in_every_call(int8_dynamic: Path, value: str) -> None:
    """In a process of its own: here the types of all arguments are checked before."""
    code = f"""
from jaxgpt_export.llm import LLM
llm, value = LLM.load({str(int8_dynamic)!r}), {value}
calls = [LLM.load, llm.generate, llm.stream, llm.logprobs, lambda stop: llm.generate("a", stop=stop)]
# A number that is None leaves it to the model, but for the seed.
names = ("seed",) if value is None else ("seed", "top_k", "top_p") if type(value) is not int else ()
for name in names:
    calls.append(lambda number, name=name: llm.generate("a", **{{name: number}}))
for call in calls:
    try:
        print("answered", call(value))
    except ValueError as error:
        print(type(error).__name__, error)
"""
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) >= 5
    assert all(line.startswith("UserError ") for line in lines), done.stdout


def test_texts_that_are_too_long_are_one_line(llm: LLM) -> None:
    for call in (llm.generate, llm.stream, llm.logprobs, lambda text: llm.generate(["a", text])):
        with pytest.raises(UserError, match="context holds 64"):
            call("xyz " * 300)


def test_an_altered_file_is_refused(int8_dynamic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(int8_dynamic, folder)
    with (folder / "merges.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"merges\.txt changed since certificate"):
        LLM.load(folder)


def test_a_folder_takes_neither_method_nor_refresh(
    int8_dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(int8_dynamic.parent.parent)
    name = f"{int8_dynamic.parent.name}/{int8_dynamic.name}"  # could be a name of the hub as well
    assert LLM.load(name).kind == "int8-dynamic"
    with pytest.raises(UserError, match=f"is a folder here.*hub:{name}"):
        LLM.load(name, method="int8-dynamic")


def test_pickled_it_is_loaded_from_its_folder_again(
    int8_dynamic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(int8_dynamic, tmp_path / "a")
    llm = LLM.load(tmp_path / "a", threads=1, kv_cache="fp32")
    pickled = pickle.dumps(llm)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.engine, again.folder) == (llm.engine, llm.folder)
    arguments = {"max_new_tokens": 8, "temperature": 0.0}
    assert again.generate(PROMPT, **arguments) == llm.generate(PROMPT, **arguments)
    monkeypatch.chdir(tmp_path)
    beside = LLM.load("a", threads=1)
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(beside)).folder == tmp_path / "a"
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=r"artifact folder .*/a is missing"):
        pickle.loads(pickled)


@pytest.mark.parametrize("source", ["./missing", "/missing/folder/x", "missing"])
def test_a_missing_folder_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match="is missing"):
        LLM.load(source)


def test_an_unknown_engine_or_cache_is_one_line(int8_dynamic: Path) -> None:
    """In a process of its own: here the types of all arguments are checked before."""
    code = f"""
from jaxgpt_export.llm import LLM
for settings in ({{"engine": "natve"}}, {{"kv_cache": "fp8"}}, {{"threads": -1}}, {{"threads": "2"}},
                 {{"threads": None}}, {{"threads": 1.5}}, {{"engine": None}}, {{"kv_cache": 16}}):
    try:
        LLM.load({str(int8_dynamic)!r}, **settings)
    except ValueError as error:
        print(type(error).__name__, error)
"""
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    first, second, third, *others = done.stdout.splitlines()
    assert first.startswith("UserError engine 'natve' is unknown; did you mean native")
    assert second.startswith("UserError kv_cache 'fp8' is unknown; did you mean fp")
    assert third.startswith("UserError threads (-1)")
    assert len(others) == 5
    assert all(line.startswith("UserError ") for line in others)


@needs_engine
def test_a_quantized_artifact_needs_neither_pytorch_nor_jax_nor_the_hub_s_library(int8_dynamic: Path) -> None:
    blocked = {"torch", "jax", "flax", "transformers", "tokenizers", "huggingface_hub", "datasets"}
    code = BLOCK.format(blocked=blocked) + (
        "from jaxgpt_export.llm import LLM\n"
        f"llm = LLM.load({str(int8_dynamic)!r})\n"
        "print(llm.generate('return', max_new_tokens=3), llm.logprobs('return').sum())"
    )
    line, environment = python(code)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
