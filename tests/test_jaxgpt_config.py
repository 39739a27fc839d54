import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_one_line_error, python

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.huggingface import hf_config_json, read_hf_config
from jaxgpt.shared.presets import PRESETS, find_preset
from jaxgpt.training.run.folder import RunConfig


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_model(name: str) -> None:
    model = PRESETS[name].model(50257)
    assert model.head_size * model.n_head == model.n_embd


def test_gpt2_preset_has_the_published_number_of_parameters() -> None:
    c = find_preset("gpt2").model(50257)
    per_block = 12 * c.n_embd**2 + 13 * c.n_embd
    total = (c.vocab_size + c.block_size) * c.n_embd + c.n_layer * per_block + 2 * c.n_embd
    assert total == 124_439_808  # Hugging Face's gpt2


def test_indivisible_n_embd_names_the_nearest_valid_ones() -> None:
    with pytest.raises(UserError, match=r"n_embd \(100\) must be divisible by n_head \(12\).*96 or 108"):
        ModelConfig(256, 64, 2, 12, 100)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean gpt2-medium"):
        find_preset("gpt2-medum")


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_steps", 0), ("batch_size", -1), ("learning_rate", 0.0), ("warmup_steps", -1), ("grad_clip", 0.0)],
)
def test_impossible_training_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        dataclasses.replace(TrainConfig(), **{field: value})


def test_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size \(10\) must be divisible by grad_accum_steps \(4\)"):
        TrainConfig(batch_size=10, grad_accum_steps=4)


def test_config_of_another_version_is_refused_with_the_names_of_its_fields() -> None:
    value = dataclasses.asdict(ModelConfig(256, 64, 2, 2, 32))
    del value["n_head"]
    with pytest.raises(UserError, match=r"unknown fields \['heads'\], missing fields \['n_head'\]"):
        ModelConfig.from_json({**value, "heads": 2}, "config.json")


MODEL = ModelConfig(256, 64, 2, 2, 32)
WRONG = {
    "int": [2.5, 2.0, True, "2", None, [2], float("nan")],
    "float": [float("nan"), float("inf"), True, "0.5", None, 10**400],
    "bool": [1, 0, "yes", None],
    "str": [3, None, ["adamw"]],
    "choice": ["bad", 3, None, ["linear"]],
    "number or none": [float("nan"), float("inf"), True, "0.5", 10**400],
}


def kind(field: "dataclasses.Field[object]") -> str:
    if field.type == float | None:
        return "number or none"
    return field.type.__name__ if isinstance(field.type, type) else "choice"


def wrong_values() -> list[object]:
    return [
        pytest.param(config, field.name, value, id=f"{field.name}-{type(value).__name__}-{str(value)[:9]}")
        for config in (MODEL, TrainConfig())
        for field in dataclasses.fields(config)
        for value in WRONG[kind(field)]
    ]


def check(config: ModelConfig | TrainConfig, **changes: object) -> None:
    """Check a configuration with values that the type checker of the tests lets no constructor have."""
    type(config).__post_init__(SimpleNamespace(**{**dataclasses.asdict(config), **changes}))


@pytest.mark.parametrize(("config", "field", "value"), wrong_values())
def test_a_value_of_another_type_is_refused_by_name_on_one_line(
    config: ModelConfig | TrainConfig, field: str, value: object
) -> None:
    with pytest.raises(UserError, match=rf"^{field} \(.*\) must [^\n]*$"):
        check(config, **{field: value})


def test_whole_numbers_are_taken_for_numbers() -> None:
    check(TrainConfig(), learning_rate=1, weight_decay=0, grad_clip=1)


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("model", "n_layer", 2.0, "n_layer (2.0) must be a whole number"),
        ("model", "tied", "yes", "tied ('yes') must be true or false"),
        ("train", "beta1", 7.0, "beta1 (7.0) must lie in [0, 1)"),
        ("train", "lr_schedule", "bad", "lr_schedule ('bad') must be cosine or linear"),
        ("train", "learning_rate", None, "learning_rate (None) must be a number"),
        ("train", "optimizer", 3, "optimizer (3) must be a name"),
    ],
)
def test_a_run_whose_configuration_can_not_be_is_one_line_with_its_file(
    tmp_path: Path, section: str, field: str, value: object, expected: str
) -> None:
    folder = {"folder": "d", "manifest_sha256": "0", "tokenizer": {"name": "gpt2", "sha256": "0"}}
    config = RunConfig("tiny", MODEL, TrainConfig(), folder).to_json()
    config[section][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["evaluate", "--run", str(tmp_path)]
    line, environment = python(f"import sys; from jaxgpt.cli import main; sys.exit(main({argv!r}))")
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    where = str(tmp_path / "config.json")
    assert_one_line_error((done.returncode, done.stdout, done.stderr), f"{where}: {expected}")


OUTSIDE = {
    "vocab_size": (0, 65_537),
    "block_size": (0, 2**20 + 1),
    "n_layer": (0, 4097),
    "n_head": (0, 3),
    "n_embd": (0, 33, 2**15 + 2),
    "dropout": (-0.1, 1.0),
    "attn_dropout": (-0.1, 1.0),
    "max_steps": (0, 2**31),
    "batch_size": (0, 2**31),
    "grad_accum_steps": (0, 3, 2**31),
    "learning_rate": (0.0, -1.0),
    "embedding_learning_rate": (0.0, -1.0),
    "final_lr_fraction": (-0.1,),
    "warmup_steps": (-1, 2**31),
    "decay_fraction": (0.0, 1.1),
    "weight_decay": (-0.1,),
    "beta1": (-0.1, 1.0, 7.0),
    "beta2": (-0.1, 1.0, 7.0),
    "momentum": (-0.1, 1.0, 7.0),
    "momentum_warmup_steps": (-1, 2**31),
    "grad_clip": (0.0, -1.0),
    "loss_chunks": (0, 2**31),
    "vocab_multiple": (0, 65_537),
    "spike_guard": (-1.0,),
    "max_skipped": (-1, 2**31),
    "prompt_loss_weight": (-0.1, 1.1),
    "seed": (-1, 2**31),
    "eval_every": (0, 2**31),
    "eval_tokens": (-1, 2**31),
    "checkpoint_every": (0, 2**31),
    "sample_every": (-1, 2**31),
}


def test_every_number_has_a_case_outside_its_bounds() -> None:
    numbers = {
        field.name
        for config in (ModelConfig, TrainConfig)
        for field in dataclasses.fields(config)
        if kind(field) in ("int", "float", "number or none")
    }
    assert set(OUTSIDE) == numbers


@pytest.mark.parametrize(("field", "value"), [(name, value) for name in OUTSIDE for value in OUTSIDE[name]])
def test_a_number_outside_its_bounds_is_refused_by_name(field: str, value: float) -> None:
    config = MODEL if field in dataclasses.asdict(MODEL) else TrainConfig()
    with pytest.raises(UserError, match=rf"{field} \({value}\)"):
        dataclasses.replace(config, **{field: value})


@pytest.mark.parametrize(
    "edge",
    [
        {"beta1": 0.0, "beta2": 0.0, "momentum": 0.0},
        {"beta1": 0.999_999, "weight_decay": 0.0, "warmup_steps": 0, "spike_guard": 0.0},
        {"decay_fraction": 1.0, "final_lr_fraction": 0.0, "max_skipped": 0, "sample_every": 0},
        {"prompt_loss_weight": 0.0},
        {"prompt_loss_weight": 1.0},
        {"max_steps": 2**31 - 1, "seed": 2**31 - 1, "grad_clip": 1e-9},
    ],
)
def test_values_on_their_bounds_are_taken(edge: dict[str, float]) -> None:
    for name, value in edge.items():
        assert getattr(dataclasses.replace(TrainConfig(), **edge), name) == value


def test_attention_has_the_dropout_of_everything_else_unless_it_is_given_its_own() -> None:
    whole, own = dataclasses.replace(MODEL, dropout=0.1), dataclasses.replace(MODEL, attn_dropout=0.1)
    assert (whole.attn_rate, own.attn_rate, own.dropout) == (0.1, 0.1, 0.0)
    assert dataclasses.replace(whole, attn_dropout=0.0).attn_rate == 0
    assert "attn_dropout" not in whole.to_json()  # what was written before there was one
    for model in (whole, own):
        assert ModelConfig.from_json(model.to_json(), "config.json") == model


@pytest.mark.parametrize(
    ("weights", "embeddings", "residuals", "expected"),
    [
        (0.2, 0.2, 0.2, (0.2, None)),
        (0.0, 0.2, 0.2, (0.2, 0.0)),
        (0.3, 0.0, 0.0, (0.0, 0.3)),
        (0.1, 0.1, 0.2, (0.0, None)),
    ],
)
def test_hugging_face_s_dropouts_are_read_and_written(
    tmp_path: Path, weights: float, embeddings: float, residuals: float, expected: tuple[float, float | None]
) -> None:
    theirs = {"attn_pdrop": weights, "embd_pdrop": embeddings, "resid_pdrop": residuals}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**hf_config_json(MODEL, 0), **theirs}))
    said = read_hf_config(path, "configuration")
    assert (said.dropout, said.attn_dropout) == expected
    model = dataclasses.replace(MODEL, dropout=said.dropout, attn_dropout=said.attn_dropout)
    written = {name: hf_config_json(model, 0)[name] for name in theirs}
    assert written == (theirs if embeddings == residuals else dict.fromkeys(theirs, 0.0))
