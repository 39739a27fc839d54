"""generation_config.json: the ids of special tokens, and how a model's tokens are drawn.

As Hugging Face has it: temperature, top_k, top_p and min_p count where do_sample is true. What a user asks
for goes first; what nobody says is this project's own default (`jaxgpt.generation.sampling.DEFAULTS`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.generation.sampling import DEFAULTS, choose_sampling, require_number
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json, write_json

GENERATION_CONFIG = "generation_config.json"


def read_generation_config(folder: Path) -> dict[str, int | float]:
    """Return what a folder's file says of temperature, top_k, top_p and min_p; nothing without a file.

    Raises:
      UserError: the file is no JSON, or a value is none that tokens can be drawn with.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    value = read_json(path, "generation configuration")
    if value.get("do_sample") is not True:
        return {}
    said: dict[str, int | float] = {}
    try:
        for name in (name for name in DEFAULTS if value.get(name) is not None):
            require_number(name, value[name], whole=name == "top_k")
            said[name] = int(value[name]) if name == "top_k" else float(value[name])
        choose_sampling(said, 0)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return said


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
