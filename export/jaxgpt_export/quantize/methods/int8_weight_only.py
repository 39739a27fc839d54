"""int8-weight-only: weights of 8 bits, by GPTQ where that helps; inputs stay float.

jaxgpt-export quantize --artifact ART --method int8-weight-only --data DATA --out ART8
"""

from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.activation import Search
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

SEARCHES: dict[str, Search | None] = {"nearest": None}  # no input is rounded


class Int8WeightOnly(Method):
    """8 bits, float inputs."""

    aliases: ClassVar[tuple[str, ...]] = ("weight-only-int8",)
    observers: ClassVar[tuple[str, ...]] = tuple(SEARCHES)

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Round weights alone."""
        return uniform_schemes(config, "float")

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Choose among rounding to nearest and GPTQ; without calibration text to nearest."""
        if not quantizer.has_text:
            return quantizer.candidate(self.name, schemes)
        return quantizer.nearest_to_float(self.name, schemes, SEARCHES)

    def observe(
        self, quantizer: Quantizer, schemes: dict[str, LayerScheme], observer: str
    ) -> QuantizedStateDict:
        """Round to nearest."""
        return quantizer.observed(self.name, schemes, SEARCHES, observer)


METHOD = Int8WeightOnly()
