"""int8-dynamic: weights of 8 bits, each token's input with a scale of its own, smoothed where that helps.

    jaxgpt-export quantize --artifact ART --method int8-dynamic --data DATA --out ART8

Without calibration text it follows from the weights alone.
"""

from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.activation import STRENGTHS, Search
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

SEARCHES = {"plain": Search(), "smoothed": Search(strengths=STRENGTHS)}


class Int8Dynamic(Method):
    """8 bits, a scale a token at run time."""

    aliases: ClassVar[tuple[str, ...]] = ("dynamic",)
    observers: ClassVar[tuple[str, ...]] = tuple(SEARCHES)

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Round every input with a scale a token."""
        return uniform_schemes(config, "dynamic")

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Choose among plain and smoothed; without calibration text plain."""
        if not quantizer.has_text:
            return quantizer.candidate(self.name, schemes)
        return quantizer.nearest_to_float(self.name, schemes, SEARCHES)

    def observe(
        self, quantizer: Quantizer, schemes: dict[str, LayerScheme], observer: str
    ) -> QuantizedStateDict:
        """Take plain or smoothed."""
        return quantizer.observed(self.name, schemes, SEARCHES, observer)


METHOD = Int8Dynamic()
