"""generation_config.json: the ids of special tokens, and how a model's tokens are drawn.

As Hugging Face has it: temperature, top_k, top_p and min_p count where do_sample is true, and one that is
missing is then what transformers takes; repetition_penalty and no_repeat_ngram_size count always. What a user
asks for goes first. Without do_sample this project's own defaults of the four hold
(`jaxgpt.generation.sampling.DEFAULTS`), and the server's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.generation.sampling import MOST_PROBABLE, NO_PENALTY, WHOLE, choose_sampling, require_number
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"
# What transformers takes where do_sample is true and nothing else is said.
OF_TRANSFORMERS: Mapping[str, int | float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# What transformers does with logits, or many texts at a time, and its value for none of it.
NOT_DONE: Mapping[str, int | float] = {
    "num_beams": 1, "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "penalty_alpha": 0.0,
}  # fmt: skip


def read_generation_config(folder: Path) -> dict[str, int | float]:
    """Return what a folder's file says of how tokens are drawn; nothing where it says nothing.

    That is all of temperature, top_k, top_p and min_p, or none; and what else changes logits.

    Raises:
      UserError: the file is no JSON, or a value is none that tokens can be drawn with.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    value = read_json(path, "generation configuration")
    defaults = OF_TRANSFORMERS if value.get("do_sample") is True else {}
    names = [name for name in (*defaults, *NO_PENALTY) if value.get(name) is not None]
    try:
        given = {name: _number(name, value[name]) for name in names}
        said = {**defaults, **{name: at for name, at in given.items() if at != NO_PENALTY.get(name)}}
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
    require_number(name, value, whole=name in WHOLE)
    assert isinstance(value, int | float)
    if name in WHOLE:
        return max(int(value), 0) if name == "top_k" else int(value)  # -1 keeps all, too
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
    drawn: dict[str, Any] = {"do_sample": True} if "temperature" in sampling else {}
    how = {**drawn, **sampling} or {"_from_model_config": True}
    write_json(folder / GENERATION_CONFIG, {**how, **ids})
