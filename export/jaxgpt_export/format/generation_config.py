"""generation_config.json: the ids of special tokens, and how a model's tokens are drawn.

As Hugging Face has it: temperature, top_k, top_p and min_p count where do_sample is true, and one that is
missing is then what transformers takes. What a user asks for goes first. Without do_sample this project's own
defaults hold (`jaxgpt.generation.sampling.DEFAULTS`), and the server's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.generation.sampling import MOST_PROBABLE, choose_sampling, require_number
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"
# What transformers takes where do_sample is true and nothing else is said.
OF_TRANSFORMERS: Mapping[str, int | float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# What transformers does with logits, or many texts at a time, and its value for none of it.
NOT_DONE: Mapping[str, int | float] = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "penalty_alpha": 0.0,
}  # fmt: skip


def read_generation_config(folder: Path) -> dict[str, int | float]:
    """Return temperature, top_k, top_p and min_p of a folder's file; nothing where it says nothing.

    Raises:
      UserError: the file is no JSON, or a value is none that tokens can be drawn with.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    value = read_json(path, "generation configuration")
    if value.get("do_sample") is not True:
        return {}
    try:
        given = {name: _number(name, value[name]) for name in OF_TRANSFORMERS if value.get(name) is not None}
        said = {**OF_TRANSFORMERS, **given}
        choose_sampling(said, 0)
    except (UserError, OverflowError) as error:
        raise UserError(f"{path}: {error}; mend that value, or leave it out") from None
    return said


def not_taken_over(folder: Path, endoftext: int) -> list[str]:
    """Return what a folder's file asks for beside, and this project does not do, such as num_beams 4.

    Args:
      folder: of a model.
      endoftext: the token that ends a text here.
    """
    path = folder / GENERATION_CONFIG
    value = read_json(path, "generation configuration") if path.is_file() else {}
    found = [
        f"{name} {value[name]}"
        for name, without in NOT_DONE.items()
        if value.get(name) is not None and value[name] != without
    ]
    ends = value.get("eos_token_id")
    others = [each for each in (ends if isinstance(ends, list) else [ends]) if each not in (None, endoftext)]
    return found + [f"eos_token_id {each}" for each in others]


def _number(name: str, value: object) -> int | float:
    """Return a value; UserError unless it is a number. All tokens, or one, as others write it too."""
    if isinstance(value, bool):
        raise UserError(f"{name} ({value}) must be a number")
    require_number(name, value, whole=name == "top_k")
    assert isinstance(value, int | float)
    if name == "top_k":
        return max(int(value), 0)  # -1 keeps all, too
    return float(value) or (MOST_PROBABLE if name == "top_p" else 0.0)


def write_generation_config(
    folder: Path, ids: Mapping[str, int], sampling: Mapping[str, int | float]
) -> None:
    """Write the file.

    Args:
      folder: exists.
      ids: of special tokens, such as eos_token_id.
      sampling: what `read_generation_config` returns again.
    """
    how: dict[str, Any] = {"do_sample": True, **sampling} if sampling else {"_from_model_config": True}
    write_json(folder / GENERATION_CONFIG, {**how, **ids})
