"""int8-static: weights of 8 bits, a calibrated scale a layer's input, clipped and smoothed where that helps.

jaxgpt-export quantize --artifact ART --method int8-static --data DATA --out ART8
"""

from typing import ClassVar

from jaxgpt.shared.config import CLIPPING_SHARES, ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.activation import STRENGTHS, Search
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

SEARCHES = {
    "min-max": Search(covered=(1.0,)),
    "clipped": Search(covered=CLIPPING_SHARES),
    "clipped-smoothed": Search(covered=CLIPPING_SHARES, strengths=STRENGTHS),
}


class Int8Static(Method):
    """8 bits, a stored scale a layer."""

    aliases: ClassVar[tuple[str, ...]] = ("static",)
    observers: ClassVar[tuple[str, ...]] = tuple(SEARCHES)

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Round every input with a stored scale."""
        return uniform_schemes(config, "static")

    def obstacle(self, artifact: Artifact) -> str | None:
        """Refuse to replace scales that were trained."""
        if not artifact.input_scales:
            return None
        return (
            f"{artifact.folder} was trained with input scales of its own, which int8-static would "
            "replace; take --method int8-static-qat"
        )

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Choose among min-max, clipped, and clipped and smoothed."""
        return quantizer.nearest_to_float(self.name, schemes, SEARCHES)

    def observe(
        self, quantizer: Quantizer, schemes: dict[str, LayerScheme], observer: str
    ) -> QuantizedStateDict:
        """Take one of them."""
        return quantizer.observed(self.name, schemes, SEARCHES, observer)


METHOD = Int8Static()
