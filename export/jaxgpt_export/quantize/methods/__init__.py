"""The methods of quantization, one file each; the file's name, with - for _, is the method's name.

A file defines METHOD, a `Method`: which scheme each layer gets, and how its tensors are chosen. Nothing lists
the files; an artifact says its layers' schemes itself, so that what reads and runs it knows no method.
"""

import functools
import importlib
import pkgutil
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from jaxgpt.shared.architecture import HEAD, linear_layers, matrices
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError, nearest

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import FLOAT32, Activation, LayerScheme

if TYPE_CHECKING:  # PyTorch comes with the first method that is imported
    from jaxgpt_export.quantize.quantizer import Quantizer
    from jaxgpt_export.quantize.state_dict import QuantizedStateDict

_ACTIVATION_WORK: dict[Activation, int] = {"static": 0, "dynamic": 1, "float": 2}


class Method:
    """A way to quantize a float32 artifact.

    Attributes:
      aliases: names that it had once.
      observers: the candidates that it compares, which --observer may name.
      chosen_by_auto: whether `--method auto` tries it.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    observers: ClassVar[tuple[str, ...]] = ()
    chosen_by_auto: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its name: that of its file."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Return the scheme of every embedding and linear layer; smoothing and two_level are chosen later."""
        raise NotImplementedError

    def obstacle(self, artifact: Artifact) -> str | None:
        """Return why it can't be applied to an artifact, as a whole sentence; None where it can."""
        return None

    def pinned(self, config: ModelConfig) -> dict[str, str]:
        """Return the matrices that may not stay in higher precision, each with what to do instead."""
        return {}

    def quantize(self, quantizer: "Quantizer", schemes: dict[str, LayerScheme]) -> "QuantizedStateDict":
        """Round the model; the candidate nearest to the float model where there is a choice."""
        raise NotImplementedError

    def observe(
        self, quantizer: "Quantizer", schemes: dict[str, LayerScheme], observer: str
    ) -> "QuantizedStateDict":
        """Round with one of the candidates that `quantize` compares."""
        raise NotImplementedError

    def apply(self, quantizer: "Quantizer", high_precision: Collection[str] = ()) -> "QuantizedStateDict":
        """Round an artifact.

        Args:
          quantizer: of the artifact.
          high_precision: matrices that stay in higher precision: 8 bits instead of 4, float32 instead of 8.

        Raises:
          UserError: the method needs what is not there (calibration text, trained scales).
        """
        config = quantizer.config
        names = matrices(config)
        if unknown := sorted(set(high_precision) - set(names)):
            raise UserError(f"there is no layer {unknown[0]}; the model has {', '.join(names)}")
        self._require_applicable(quantizer.artifact)
        for name, instead in self.pinned(config).items():
            if name in high_precision:
                raise UserError(instead)
        return self.quantize(quantizer, raised(config, self.schemes(config), high_precision))

    def apply_observer(self, quantizer: "Quantizer", observer: str) -> "QuantizedStateDict":
        """Round with one of the candidates that the method compares, whatever it costs."""
        self._require_applicable(quantizer.artifact)
        if observer not in self.observers:
            raise UserError(
                f"method {self.name} has no observer {observer!r}; "
                f"expected {', '.join(self.observers) or 'none at all'}"
            )
        return self.observe(quantizer, self.schemes(quantizer.config), observer)

    def _require_applicable(self, artifact: Artifact) -> None:
        if obstacle := self.obstacle(artifact):
            raise UserError(obstacle)

    def cost(self, config: ModelConfig) -> tuple[float, int]:
        """Return what orders methods: bytes of weights that a token reads, then work a token."""
        schemes, size = self.schemes(config), 0.0
        for name, layer in linear_layers(config).items():
            scheme = schemes[name]
            scales = 0.0 if scheme.is_float else 4.0
            if scheme.group_size and scheme.activation == "float":
                scales = 2.0 * layer.inputs / scheme.group_size
            elif scheme.group_size:  # factors of groups
                scales += layer.inputs / scheme.group_size
            size += layer.outputs * (layer.inputs * scheme.weight_bits / 8 + scales)
        return size, max(_ACTIVATION_WORK[schemes[name].activation] for name in linear_layers(config))


@functools.cache
def all_methods() -> dict[str, Method]:
    """Return every method by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        method: Method = importlib.import_module(f"{__name__}.{module.name}").METHOD
        found[method.name] = method
    return found


def find_method(name: str) -> Method:
    """Return a method by its name or one that it had; UserError names the nearest ones."""
    methods = all_methods()
    aliases = {alias: method for method in methods.values() for alias in method.aliases}
    found = methods.get(name) or aliases.get(name)
    if found is None:
        raise UserError(f"method {name!r} is unknown; {nearest(name, [*methods, 'auto'])}")
    return found


def uniform_schemes(config: ModelConfig, activation: Activation) -> dict[str, LayerScheme]:
    """Return schemes of 8 bits everywhere, with one kind of input for every linear layer."""
    linear = linear_layers(config)
    return {
        name: LayerScheme(activation=activation if name in linear else "float")
        for name in (*matrices(config), HEAD)
    }


def raised(
    config: ModelConfig, schemes: dict[str, LayerScheme], names: Collection[str]
) -> dict[str, LayerScheme]:
    """Return schemes with some matrices in higher precision: 8 bits instead of 4, else float32."""
    linear = linear_layers(config)
    higher = {name for name in schemes if (linear[name].matrix if name in linear else name) in names}

    def raise_one(scheme: LayerScheme) -> LayerScheme:
        return LayerScheme(activation=scheme.activation) if scheme.weight_bits == 4 else FLOAT32

    return {name: raise_one(each) if name in higher else each for name, each in schemes.items()}
