"""Settings that are measured beside the first ones: `--variant remat=true,loss_chunks=16`."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError, nearest
from jaxgpt.training.optimizers import check_optimizer

FLASH, XLA_FLAGS = "flash", "xla_flags"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What one trainer is told.

    Attributes:
      name: settings in which it differs, as they were given; "" for none.
      model: shape.
      train: settings.
      flash: attention by cuDNN; None leaves it to the trainer.
      xla_flags: given to XLA beside those of the environment.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    flash: bool | None = None
    xla_flags: str = ""


def parse_variants(texts: Sequence[str], first: Variant) -> list[Variant]:
    """Read every --variant; UserError says what is wrong with one, or that two are the same."""
    found = [parse_variant(text, first) for text in texts]
    for number, each in enumerate(found):
        if each.name in [before.name for before in found[:number]]:
            raise UserError(f"--variant {each.name} is given twice; leave one out")
    return found


def parse_variant(text: str, first: Variant) -> Variant:
    """Read "remat=true,loss_chunks=16".

    Args:
      text: names with values, separated by commas.
      first: whose settings count where the text says nothing.

    Raises:
      UserError: no setting of that name, or a value that it can't have.
    """
    given: dict[str, Any] = {}
    names = [field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)]
    names += [FLASH, XLA_FLAGS]
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in names:
            raise UserError(f"--variant {text!r}: a training has no setting {name!r}; {nearest(name, names)}")
        if not equals or name in given:
            raise UserError(f"--variant {text!r}: {name} needs one value, such as {name}=VALUE")
        given[name] = value.strip() if name == XLA_FLAGS else _value(value.strip())
    try:
        model = dataclasses.replace(first.model, **_of(ModelConfig, given))
        train = dataclasses.replace(first.train, **_of(TrainConfig, given))
        check_optimizer(train.optimizer)
    except UserError as error:
        raise UserError(f"--variant {text!r}: {error}") from None
    flash, flags = given.get(FLASH, first.flash), str(given.get(XLA_FLAGS, first.xla_flags))
    if not isinstance(flash, bool | None):
        raise UserError(f"--variant {text!r}: flash ({flash!r}) must be true or false")
    if not all(flag.startswith("--xla_") for flag in shlex.split(flags)):
        raise UserError(
            f"--variant {text!r}: xla_flags must begin with --xla_, such as --xla_gpu_autotune_level=0"
        )
    return Variant(text.strip(), model, train, flash, flags)


def _of(kind: type[ModelConfig] | type[TrainConfig], given: dict[str, Any]) -> dict[str, Any]:
    return {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}


def _value(text: str) -> object:
    """Read a number, true, false or null as JSON does; anything else is a name."""
    try:
        return json.loads(text)
    except ValueError:
        return text
