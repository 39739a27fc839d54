import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.common.timing import agreeing
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.model.build import build_model


def test_texts_agree_up_to_the_first_token_that_differs() -> None:
    assert agreeing([1, 2, 3], [1, 2, 3]) == 3
    assert agreeing([1, 2, 3], [1, 9, 3]) == 1
    assert agreeing([1], [2]) == 0


def test_programs_write_the_same_greedy_text(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    arguments = ("--artifact", fp32, "--data", data, "--tokens", 20, "--out", tmp_path / "a.json")
    assert command("jaxgpt-bench", "agreement", *arguments)[0] == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    programs = [row["program"] for row in figures["rows"]]
    llama = importlib.util.find_spec("llama_cpp") is not None
    assert programs == ["transformers", *(["llama.cpp f32", "llama.cpp f16"] if llama else [])]
    artifact = read_artifact(fp32)
    model, tokenizer = build_model(artifact), artifact.tokenizer()
    tokens = tokenizer.encode(figures["prompts"][0])
    start = len(tokens)
    for _ in range(20):  # without a cache, token by token: apart from the code under test
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert figures["texts"][0] == tokenizer.decode(tokens[start:])


def test_a_program_that_parts_early_fails(
    command: Command, fp32: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from jaxgpt_bench.quality import agreement

    real = agreement.TransformersSession._run

    def second_best(self, tokens: list[int]):
        logits = real(self, tokens).copy()
        logits[logits.argmax()] = -1e9
        return logits

    monkeypatch.setattr(agreement.TransformersSession, "_run", second_best)
    code, _, err = command("jaxgpt-bench", "agreement", "--artifact", fp32, "--data", data, "--tokens", 5)
    assert code == 1
    assert "FAIL  transformers" in err


@pytest.mark.parametrize("tokens", [0, 64])
def test_more_tokens_than_fit_is_one_line(command: Command, fp32: Path, data: Path, tokens: int) -> None:
    arguments = ("--artifact", fp32, "--data", data, "--tokens", tokens)
    assert_one_line_error(command("jaxgpt-bench", "agreement", *arguments), f"--tokens {tokens}")


def test_an_int8_artifact_is_no_folder_for_others(command: Command, int8_dynamic: Path, data: Path) -> None:
    arguments = ("--artifact", int8_dynamic, "--data", data)
    assert_one_line_error(command("jaxgpt-bench", "agreement", *arguments), "no Hugging Face GPT-2")
