"""Stock lm-evaluation-harness over `jaxgpt-export serve`: its figures are those of the model as it runs.

    pip install 'lm_eval[api,hf]'  # here, or in an environment whose lm_eval stands in PATH
    pytest -m slow tests/test_export_lm_eval.py

The float32 model gives what lm_eval's own `hf` model gives for the same folder, the INT8 model what follows
from the logits of the engine.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from conftest import rows
from jaxgpt_export.llm import LLM
from jaxgpt_export.native.library import instruction_sets
from serving import Served, serving

from jaxgpt.generation.session import ScoringSession

COMMAND = shutil.which("lm_eval")
KEY = "a key"
CONTEXT = 64  # tokens, of the tiny model
# lm_eval keeps one token of an API's max_length for the token that it has to ask for, and one of a window
# for what stands before it; its hf model does not.
WINDOW = CONTEXT - 2
NEW_TOKENS = 12

# hf takes log-softmax and sums in float32, the server in float64. On the tiny model they are 8 times closer.
EXACT = 1e-5
FLOAT32 = 1e-6  # of a log-likelihood

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMMAND is None, reason="no lm_eval: pip install 'lm_eval[api,hf]'"),
    pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine"),
]

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "writing": f"""
output_type: generate_until
doc_to_text: text
doc_to_target: text
generation_kwargs: {{until: ["\\n\\n", "return"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


class Scores(NamedTuple):
    """What lm_eval found.

    Attributes:
      choices: log-likelihood of each choice, and whether it is what the model would write.
      rolling: log-likelihood of each text.
      written: the text after each prompt.
      figures: of each task, by the metric's name.
    """

    choices: dict[tuple[str, str], tuple[float, bool]]
    rolling: dict[str, float]
    written: dict[str, str]
    figures: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, [row["text"] for row in rows(12, seed=1)])
    return folder


def write_tasks(folder: Path, texts: list[str]) -> None:
    """Write three tasks over texts: short and beyond the context, from their beginning and to their end."""
    long = "\n\n".join(texts[:4])
    starts = [text.partition(" by ")[0] for text in texts]
    choices: list[dict[str, Any]] = [
        {"text": start, "choices": [f" by the {name}," for name in ("total", "index", "price")], "answer": 0}
        for start in starts[:6]
    ]
    choices += [
        {"text": text[: len(text) // 2], "choices": [text[len(text) // 2 :], " return"], "answer": 0}
        for text in texts[6:10]
    ]
    choices += [
        {"text": "", "choices": [text[:50] for text in texts[10:12]], "answer": 1},
        {"text": "x ", "choices": [" = 1", "日本"], "answer": 1},
        {"text": texts[10], "choices": ["<|endoftext|>", "\n"], "answer": 0},
        {"text": long, "choices": ["<|endoftext|>", "\n"], "answer": 0},
    ]
    write_task(folder, "choice", choices)
    write_task(folder, "rolling", [{"text": text} for text in (*texts[:4], *starts[4:8], "def", long)])
    write_task(folder, "writing", [{"text": text} for text in (*starts[:4], texts[5][:40], long)])


def write_task(folder: Path, name: str, documents: list[dict[str, Any]]) -> None:
    """Write a task of lm_eval and its documents into a folder that is given to --include_path."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}"
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}\ntest_split: test{TASKS[name]}")


@pytest.fixture(scope="module")
def evaluate(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scores]:
    """Run lm_eval's command on the tasks."""
    home = tmp_path_factory.mktemp("home")

    def run(model: str, /, *more: str, **model_args: object) -> Scores:
        return run_lm_eval(tasks, tmp_path_factory.mktemp("scores"), home, model, *more, **model_args)

    return run


def run_lm_eval(
    tasks: Path, out: Path, home: Path, model: str, /, *more: str, **model_args: object
) -> Scores:
    """Run lm_eval's command; read what it wrote."""
    assert COMMAND is not None
    words = [COMMAND, "run", "--model", model, "--tasks", *TASKS, "--include_path", str(tasks)]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    words += ["--log_samples", "--output_path", str(out), *more]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OPENAI_API_KEY": KEY}
    run = subprocess.run(words, env=kept | offline, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return read_scores(out)


def read_scores(out: Path) -> Scores:
    """Read the samples and results that lm_eval wrote into a folder."""
    scores = Scores({}, {}, {}, {})
    for name in TASKS:
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            arguments = [tuple(given.values()) for given in sample["arguments"].values()]
            for given, (answer,) in zip(arguments, sample["resps"], strict=True):
                if name == "choice":
                    scores.choices[given] = (float(answer[0]), answer[1] == "True")
                elif name == "rolling":
                    scores.rolling[given[0]] = float(answer)
                else:
                    scores.written[given[0]] = answer
    (path,) = out.rglob("results_*.json")
    scores.figures.update(json.loads(path.read_text())["results"])
    return scores


@pytest.fixture(scope="module")
def server(fp32: Path, int8_dynamic: Path) -> Iterator[Served]:
    with serving("--api-key", KEY, "--artifact", f"small={fp32}", f"int8={int8_dynamic}") as served:
        yield served


def test_a_float32_model_has_the_scores_of_lm_eval_s_own_hf_model(
    server: Served, evaluate: Callable[..., Scores], fp32: Path
) -> None:
    own = evaluate("hf", "--device", "cpu", pretrained=fp32, dtype="float32", max_length=WINDOW)
    limits = {"max_length": CONTEXT, "max_gen_toks": NEW_TOKENS}
    address = f"{server.address}/v1/completions"
    served = evaluate(
        "local-completions", model="small", base_url=address, tokenizer=fp32, num_concurrent=3, **limits
    )
    assert_same(served, own)


def assert_same(served: Scores, own: Scores) -> None:
    """Compare all that two runs of lm_eval found, up to what float32 leaves open."""
    assert served.choices.keys() == own.choices.keys()
    for given, (log_likelihood, greedy) in own.choices.items():
        assert served.choices[given][0] == pytest.approx(log_likelihood, rel=FLOAT32, abs=EXACT)
        assert served.choices[given][1] == greedy
    assert {greedy for _, greedy in own.choices.values()} == {True, False}
    assert served.rolling == pytest.approx(own.rolling, rel=FLOAT32, abs=EXACT)
    assert served.written == own.written
    assert served.figures["choice"]["acc,none"] == own.figures["choice"]["acc,none"]


def test_an_int8_model_has_the_scores_of_the_engine_s_logits(
    server: Served, evaluate: Callable[..., Scores], int8_dynamic: Path
) -> None:
    served = evaluate(
        "local-completions",
        "--batch_size",
        "4",
        model="int8",
        base_url=f"{server.address}/v1/completions",
        tokenizer_backend="remote",
        auth_token=KEY,
        max_length=CONTEXT,
        max_gen_toks=NEW_TOKENS,
    )
    assert_engine_s(served, LLM.load(int8_dynamic))


def assert_engine_s(served: Scores, llm: LLM) -> None:
    """Compare what lm_eval found with the logits of a model, asked here without a server."""
    encode, end = llm.tokenizer.encode, llm.tokenizer.endoftext
    most = llm.context_tokens - 1
    for (context, choice), (log_likelihood, greedy) in served.choices.items():
        tokens = encode(context + choice, special=True)
        before = encode(context.rstrip(), special=True)
        right, best = score_tokens(llm, before or [end], tokens[len(before) :], most)
        assert log_likelihood == pytest.approx(right, abs=EXACT)
        assert greedy == best
    for text, log_likelihood in served.rolling.items():
        assert log_likelihood == pytest.approx(rolling(llm, text, most - 1), abs=EXACT)
    for prompt, text in served.written.items():
        kept = encode(prompt, special=True)[-(most - NEW_TOKENS) :]
        assert text == greedy_text(llm, kept).split("\n\n")[0].split("return")[0]


def rolling(llm: LLM, text: str, window: int) -> float:
    """The log-likelihood of a text in windows; a last one that is short has more before it."""
    tokens = llm.tokenizer.encode(text, special=True)
    total = 0.0
    for start in range(0, len(tokens), window):
        asked = tokens[start : start + window]
        given = tokens[max(start + len(asked) - window - 1, 0) : start] or [llm.tokenizer.endoftext]
        total += score_tokens(llm, given, asked, window + 1)[0]
    return total


def score_tokens(llm: LLM, given: list[int], asked: list[int], most: int) -> tuple[float, bool]:
    """The log-likelihood of tokens after others in float64, and whether each is the most probable one."""
    tokens = [*given, *asked][-most:]
    asked = tokens[-min(len(asked), len(tokens) - 1) :]
    session = llm._model.new_session(1)
    assert isinstance(session, ScoringSession)
    logits = session.forward(tokens[:-1], all_logits=True)[-len(asked) :]
    exact: npt.NDArray[np.float64] = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    return exact[np.arange(len(asked)), asked].sum(), exact.argmax(axis=1).tolist() == asked


def greedy_text(llm: LLM, prompt: list[int]) -> str:
    """The text of the most probable tokens after a prompt, from logits alone."""
    session = llm._model.new_session(1)
    assert isinstance(session, ScoringSession)
    found: list[int] = []
    logits = session.forward(prompt, all_logits=True)
    while len(found) < NEW_TOKENS and (token := int(logits[-1].argmax())) != llm.tokenizer.endoftext:
        found.append(token)
        logits = session.forward([token], all_logits=True)
    return llm.tokenizer.decode(found)
