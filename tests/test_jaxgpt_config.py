import dataclasses

import pytest

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.presets import PRESETS, find_preset


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
