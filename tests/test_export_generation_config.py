"""How tokens are drawn where nobody says: as the artifact's generation_config.json does, in every door."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_bench.evaluate.command import EvaluateOptions, _samplings, settings_of, with_sampling
from jaxgpt_bench.reproduce import artifacts
from jaxgpt_bench.reproduce.stages import Stages
from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.llm import LLM
from jaxgpt_export.native.library import instruction_sets
from serving import serving
from small_gpt2 import gpt2, run_import, save, small_tokenizer
from transformers import GenerationConfig

from jaxgpt.generation.sampling import DEFAULTS, MOST_PROBABLE
from jaxgpt.shared.dataset import open_dataset

PROMPT = "Write a function to add"
SAID = {"temperature": 1.7, "top_k": 3, "top_p": 1.0, "min_p": 0.05}
LENGTH = 24

needs_engine = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")


@pytest.fixture(scope="module")
def drawn(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 artifact that says how it is drawn."""
    from conftest import run_command

    out = tmp_path_factory.mktemp("drawn") / "fp32"
    said = ("--temperature", SAID["temperature"], "--top-k", SAID["top_k"])
    assert run_command("jaxgpt-export", "convert", "--run", run, "--out", out, *said) == 0
    return out


def test_transformers_reads_what_convert_was_told(drawn: Path, fp32: Path) -> None:
    config = GenerationConfig.from_pretrained(drawn)
    assert config.do_sample is True
    assert {name: getattr(config, name) for name in SAID} == SAID
    plain = json.loads((fp32 / "generation_config.json").read_text())
    assert config.eos_token_id == plain["eos_token_id"]
    assert not {*SAID, "do_sample"} & plain.keys()
    assert read_generation_config(drawn) == SAID
    assert read_generation_config(fp32) == {}
    assert "drawn with temperature 1.7, top_k 3, top_p 1, min_p 0.05" in (drawn / "README.md").read_text()


def test_llm_draws_as_the_artifact_says_and_as_it_is_told(drawn: Path, fp32: Path) -> None:
    """What is said once, of one of the four, leaves the others to the artifact."""
    said, plain = LLM.load(drawn), LLM.load(fp32)
    asked = {"temperature": SAID["temperature"], "top_k": 3}
    text = said.generate(PROMPT, max_new_tokens=LENGTH)
    assert text == plain.generate(PROMPT, max_new_tokens=LENGTH, **asked)  # type: ignore[arg-type]
    assert text != plain.generate(PROMPT, max_new_tokens=LENGTH)
    assert text == "".join(said.stream(PROMPT, max_new_tokens=LENGTH))
    cold = said.generate(PROMPT, max_new_tokens=LENGTH, temperature=0.8, top_k=0)
    assert cold == plain.generate(PROMPT, max_new_tokens=LENGTH)
    warm = said.generate(PROMPT, max_new_tokens=LENGTH, temperature=5.0)
    assert warm == plain.generate(PROMPT, max_new_tokens=LENGTH, temperature=5.0, top_k=3)
    greedy = said.generate(PROMPT, max_new_tokens=LENGTH, temperature=0.0)
    assert greedy == plain.generate(PROMPT, max_new_tokens=LENGTH, temperature=0.0)


def test_generate_and_what_is_quantized_draw_so_too(
    command: Command, drawn: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int8"
    options = ("--method", "int8-weight-only", "--data", data, "--out", out)
    code, _, err = command("jaxgpt-export", "quantize", "--artifact", drawn, *options)
    assert code == 0, err
    assert read_generation_config(out) == SAID
    call = ("jaxgpt-export", "generate", "--prompt", PROMPT, "--max-new-tokens", LENGTH, "--artifact")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "max_new_tokens": LENGTH}) + "\n")
    for artifact in (drawn, out):
        expected = LLM.load(artifact).generate(PROMPT, max_new_tokens=LENGTH)
        assert command(*call, artifact)[1] == expected + "\n"
        of_file = command("jaxgpt-export", "generate", "--prompts", prompts, "--artifact", artifact)[1]
        assert json.loads(of_file)["text"] == expected
        assert command(*call, artifact, "--top-k", 1)[1] != expected + "\n"


@needs_engine
def test_the_server_draws_so_where_a_request_says_nothing(drawn: Path, fp32: Path) -> None:
    wish = {"prompt": PROMPT, "max_tokens": LENGTH, "seed": 0}
    with serving("--artifact", f"drawn={drawn}", f"plain={fp32}") as server:
        answers = {
            name: server.complete(model=model, **wish, **asked)["choices"][0]["text"]
            for name, model, asked in (
                ("said", "drawn", {}),
                ("asked", "plain", SAID),
                ("nothing", "plain", {}),
                ("openai", "drawn", {"temperature": 1, "top_k": 0, "min_p": 0}),
            )
        }
    assert answers["said"] == answers["asked"] == LLM.load(drawn).generate(PROMPT, max_new_tokens=LENGTH)
    assert answers["openai"] == answers["nothing"] != answers["said"]


def test_an_import_keeps_what_the_source_says_where_it_draws_at_all(command: Command, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    source = save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path / "hf")
    # What is missing is what transformers takes; without do_sample it draws nothing.
    missing = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    cases: tuple[tuple[dict[str, object], dict[str, float]], ...] = (
        ({"do_sample": True, "temperature": 0.6, "top_p": None}, {**missing, "temperature": 0.6}),
        ({"do_sample": True, "top_k": -1, "top_p": 0}, {**missing, "top_k": 0, "top_p": MOST_PROBABLE}),
        ({"do_sample": True}, missing),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"temperature": 0.6}, {}),
        # What transformers does to logits it does to greedy text as well.
        ({"repetition_penalty": 1.2, "no_repeat_ngram_size": 0}, {"repetition_penalty": 1.2}),
        ({"do_sample": True, "no_repeat_ngram_size": 5}, {**missing, "no_repeat_ngram_size": 5}),
    )
    for place, (content, kept) in enumerate(cases):
        (source / "generation_config.json").write_text(json.dumps(content))
        run_import(command, source, tmp_path / f"a{place}")
        assert read_generation_config(tmp_path / f"a{place}") == kept
        again = GenerationConfig.from_pretrained(tmp_path / f"a{place}")
        assert {name: getattr(again, name) for name in kept} == kept
        assert (again.do_sample is True) == ("temperature" in kept)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature (-1.0) must be 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k (2.5) must be a whole number"),
        ({"do_sample": True, "min_p": "a"}, "min_p ('a') must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty (0.0) must lie in [0.01, 100]"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size (2.5) must be a whole number"),
        ({"do_sample": True, "top_k": True}, "top_k (True) must be a number"),
        ({"do_sample": True, "temperature": 10**400}, "too large"),
        ([], "holds a list, expected a JSON object"),
    ],
)
def test_a_value_that_no_token_is_drawn_with_is_one_line(
    command: Command, fp32: Path, tmp_path: Path, content: object, expected: str
) -> None:
    shutil.copytree(fp32, tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(content))
    result = command("jaxgpt-export", "generate", "--artifact", tmp_path / "a", "--prompt", "a")
    assert_one_line_error(result, "generation_config.json", expected)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", 0, "--temperature of an artifact (0.0) must be above 0"),
        ("--temperature", -1, "--temperature of an artifact (-1.0) must be above 0"),
        ("--top-p", 2, "top_p (2.0) must lie in (0, 1]"),
        ("--no-repeat-ngram-size", -1, "no_repeat_ngram_size (-1) must be 0"),
    ],
)
def test_convert_refuses_such_a_value_and_writes_nothing(
    command: Command, run: Path, tmp_path: Path, option: str, value: float, expected: str
) -> None:
    call = ("jaxgpt-export", "convert", "--run", run, "--out", tmp_path / "a", option, value)
    assert_one_line_error(command(*call), expected)
    assert not (tmp_path / "a").exists()


def test_answers_are_measured_as_the_first_artifact_draws(drawn: Path, fp32: Path, tmp_path: Path) -> None:
    options = with_sampling(EvaluateOptions((drawn, fp32)))
    assert (options.temperature, options.min_p) == (1.7, 0.05)
    options = with_sampling(EvaluateOptions((fp32, drawn), min_p=0.1))
    assert (options.temperature, options.min_p) == (DEFAULTS["temperature"], 0.1)
    drawn_so, greedy = _samplings(with_sampling(EvaluateOptions((drawn,))))
    assert (drawn_so.top_k, greedy.top_k) == (3, 0)
    options = with_sampling(EvaluateOptions((drawn,), no_repeat_ngram_size=8, repetition_penalty=1.0))
    assert [each.no_repeat_ngram_size for each in _samplings(options)] == [8, 8]
    assert settings_of(options)["no_repeat_ngram_size"] == 8
    assert "repetition_penalty" not in settings_of(options)
    said = json.loads((fp32 / "generation_config.json").read_text()) | {"no_repeat_ngram_size": 5}
    shutil.copytree(fp32, tmp_path / "penalized")
    (tmp_path / "penalized" / "generation_config.json").write_text(json.dumps(said))
    for asked, found in ((None, 5), (0, 0)):  # no penalty can be asked for, too
        options = with_sampling(EvaluateOptions((tmp_path / "penalized",), no_repeat_ngram_size=asked))
        assert [each.no_repeat_ngram_size for each in _samplings(options)] == [found, found]
        assert settings_of(options).get("no_repeat_ngram_size", 0) == found


def test_what_nothing_here_does_is_said_when_a_model_comes_in(command: Command, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    source = save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path / "source")
    found = {"eos_token_id": [5, tokenizer.endoftext], "encoder_repetition_penalty": 1.3, "num_beams": 1}
    (source / "generation_config.json").write_text(json.dumps(found))
    err = run_import(command, source, tmp_path / "a")
    said = "not taken over, as nothing here does it: encoder_repetition_penalty 1.3, eos_token_id 5"
    assert said in " ".join(err.split())


def test_a_reproduction_converts_and_quantizes_again_where_its_recipe_draws_otherwise(
    run: Path, data: Path, tmp_path: Path
) -> None:
    dataset, out, small = open_dataset(data), tmp_path / "fp32", tmp_path / "int8-weight-only"
    for sampling, kept in (
        ({}, False),
        ({}, True),
        ({"temperature": 0.5}, False),
        ({"temperature": 0.5}, True),
    ):
        stages = Stages()
        artifacts.converted(stages, out, run, dataset, sampling)
        artifacts.quantized(stages, small, "int8-weight-only", out, dataset)
        assert [entry.kept for entry in stages.log] == [kept, kept]
        expected = {**DEFAULTS, **sampling} if sampling else {}
        assert read_generation_config(out) == read_generation_config(small) == expected
