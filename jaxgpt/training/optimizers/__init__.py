"""The optimizers of the blocks' matrices, one file each; the file's name is the optimizer's name.

A file has one function, `matrices(config, learning_rate)`, that returns an optax transformation; where it
also takes `mesh`, it gets the devices that share a CPU's cores, or None. Everything else (embeddings, gains,
biases) is AdamW's; see step/optimizer.py. Nothing lists the files. No JAX here: a name is checked before JAX
starts.
"""

import importlib
import pkgutil
from types import ModuleType

from jaxgpt.shared.errors import UserError, nearest


def optimizer_names() -> list[str]:
    """Return the names of all optimizers."""
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def check_optimizer(name: str) -> None:
    """Raise UserError, with the nearest names, unless there is an optimizer of that name."""
    if name not in optimizer_names():
        raise UserError(f"optimizer {name!r} is unknown; {nearest(name, optimizer_names())}")


def find_optimizer(name: str) -> ModuleType:
    """Return the module of an optimizer; UserError names the nearest ones."""
    check_optimizer(name)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
