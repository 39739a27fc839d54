"""What the config.json of an imported model may say, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_export.parity.models import transformers_model
from small_gpt2 import (
    assert_same,
    gpt2,
    run_import,
    save,
    small_tokenizer,
)

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.huggingface import (
    ALIASES,
    FIELD_TYPES,
    SETTINGS,
    SHAPE_FIELDS,
    WRITTEN_SETTINGS,
    read_hf_config,
)
from jaxgpt.shared.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def source(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tied head."""
    return save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path / "hf")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt_neo"}, ("'gpt_neo'", "expected gpt2")),
        ({"activation_function": "gelu"}, ("activation_function 'gelu'", "'gelu_new' only")),
        ({"activation_function": "relu"}, ("activation_function 'relu'",)),
        ({"n_inner": 64}, ("n_inner 64", "= 128")),
        ({"scale_attn_by_inverse_layer_idx": "yes"}, ("scale_attn_by_inverse_layer_idx 'yes'",)),
        ({"scale_attn_weights": False}, ("scale_attn_weights False",)),
        ({"layer_norm_epsilon": 1e-6}, ("layer_norm_epsilon 1e-06", "1e-05 only")),
        ({"n_layer": None}, ("lacks n_layer",)),
        ({"n_layer": 3}, ("missing tensors: h.2.attn.c_attn.bias",)),
        ({"n_layer": 1}, ("unexpected tensors: h.1.",)),
        ({"n_head": 5}, ("n_embd (32) must be divisible by n_head (5)",)),
        ({"n_positions": 12}, ("wpe.weight is float32 (16, 32)", "(12, 32)")),
        ({"vocab_size": 999}, ("wte.weight is float32 (300, 32)", "(999, 32)")),
        ({"tie_word_embeddings": False}, ("missing tensors: lm_head.weight",)),
        ({"hidden_size": 64}, ("n_embd 32 and hidden_size 64", "leave one out")),
        ({"model_type": None}, ("model_type None",)),
    ],
)
def test_configuration_that_does_not_fit_is_one_line(
    command: Command, source: Path, tmp_path: Path, changes: dict[str, object], parts: tuple[str, ...]
) -> None:
    edit_config(source, **changes)
    call = command("jaxgpt-export", "import-hf", "--source", source, "--out", tmp_path / "a")
    assert_one_line_error(call, *parts)
    assert not (tmp_path / "a").exists()


def test_settings_that_change_nothing_are_accepted(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    edit_config(
        source, n_inner=128, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True, n_ctx=16
    )
    run_import(command, source, tmp_path / "a")
    assert_same(gpt2(tokenizer.vocab_size), tmp_path / "a", tokenizer, True)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("initializer_range", 1, "a number with a point, such as 0.02"),
        ("use_cache", None, "true or false"),
        ("pad_token_id", "299", "a whole number or null"),
        ("eos_token_id", 299.0, "a whole number, several, or null"),
        ("eos_token_id", ["299"], "a whole number, several, or null"),
        ("n_inner", 128.0, "a whole number or null"),
        ("summary_type", None, "a text"),
        ("resid_pdrop", "0.1", "a number"),
    ],
)
def test_a_field_of_another_type_is_one_line_for_the_reader_and_for_transformers(
    source: Path, name: str, value: object, expected: str
) -> None:
    edit_config(source, **{name: value})
    for reader in (lambda folder: read_hf_config(folder / "config.json", "it"), transformers_model):
        with pytest.raises(UserError) as raised:
            reader(source)
        assert f"config.json has {name} {value!r}, expected {expected}; correct" in str(raised.value)


def test_every_type_that_transformers_checks_is_checked_here() -> None:
    theirs = {field.name for field in dataclasses.fields(transformers.GPT2Config)}
    inherited = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    elsewhere = {*SHAPE_FIELDS.values(), *SETTINGS, *WRITTEN_SETTINGS, "tie_word_embeddings"}
    assert theirs - inherited - elsewhere <= set(FIELD_TYPES)


def test_names_of_other_models_and_no_model_type_are_read(
    command: Command, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = source / "config.json"
    value = json.loads(path.read_text())
    del value["model_type"]
    for alias, name in ALIASES.items():
        value[alias] = value.pop(name)
    path.write_text(json.dumps(value))
    run_import(command, source, tmp_path / "a")
    assert_same(gpt2(tokenizer.vocab_size), tmp_path / "a", tokenizer, True)
