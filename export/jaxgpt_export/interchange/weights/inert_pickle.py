"""Pickles of PyTorch whose objects become inert stand-ins: nothing that a file names is imported or called.

Trainers save their settings beside the weights, as an object of a class of their own (GPTConfig), an
argparse.Namespace or a numpy scalar. torch.load(weights_only=True) refuses such a file as a whole. Here it
reads it with a stand-in in place of every class and function that is not on PyTorch's own list: a stand-in
keeps the arguments and the attributes that the file gives, and does nothing.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class StandIn:
    """What a pickle says of an object of a class that was not loaded.

    Attributes:
      qualified_name: of the class or function that the file names.
      arguments: that it would have been called with.
      state: that would have been its attributes; None without any.
    """

    qualified_name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Keep the arguments, whatever they are."""
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        """Do nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        self.state = state

    def __repr__(self) -> str:
        return f"an object of {self.qualified_name}"


def load_inert(path: Path) -> Any:
    """Read a pickle of PyTorch.

    Args:
      path: what torch.save wrote.

    Returns:
      What it holds: tensors, plain values and stand-ins.

    Raises:
      pickle.UnpicklingError: it is of another kind, or holds more than that; so do RuntimeError, EOFError,
        LookupError, TypeError and ValueError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
            unknown = []  # no file of torch.save as it is today: torch.load says what it is
        stand_ins: list[Any] = [
            (type("StandIn", (StandIn,), {"qualified_name": name}), name) for name in unknown
        ]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


def attributes(value: Any) -> dict[str, Any]:
    """Return what a mapping or a stand-in holds by name, numpy's scalars as numbers; empty for all else."""
    state = value
    if isinstance(value, StandIn):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if not isinstance(state, Mapping):
        return {}
    return {str(name): _number(each) for name, each in state.items()}


def _number(value: Any) -> Any:
    """Return the number that a stand-in of numpy's scalar stands for; every other value as it is."""
    if not isinstance(value, StandIn) or not value.qualified_name.endswith("multiarray.scalar"):
        return value
    match value.arguments:
        case (StandIn(arguments=(str(code), *_)), bytes(raw)) if re.fullmatch(r"[iuf][248]|[iu]1", code):
            dtype = np.dtype(f"<{code}")
            return np.frombuffer(raw, dtype)[0].item() if len(raw) == dtype.itemsize else value
    return value
