"""int4-weight-only: 4 bits in groups by GPTQ, float inputs; embeddings and head keep 8 bits.

jaxgpt-export quantize --artifact ART --method int4-weight-only --data DATA --out ART4
"""

from typing import ClassVar

from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import GROUP_ROUNDINGS, Quantizer, group_size_of
from jaxgpt_export.quantize.state_dict import QuantizedStateDict


class Int4WeightOnly(Method):
    """4 bits in the blocks, float inputs."""

    aliases: ClassVar[tuple[str, ...]] = ("weight-only-int4",)
    observers: ClassVar[tuple[str, ...]] = GROUP_ROUNDINGS

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the blocks' matrices 4 bits."""
        four = LayerScheme(weight_bits=4, group_size=group_size_of(config))
        blocks = {name: four for name, layer in linear_layers(config).items() if layer.block is not None}
        return uniform_schemes(config, "float") | blocks

    def obstacle(self, artifact: Artifact) -> str | None:
        """Ask for an even number of channels: two weights share a byte."""
        if artifact.config.n_embd % 2 == 0:
            return None
        return f"4-bit weights need an even number of channels, n_embd is {artifact.config.n_embd}"

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Round by GPTQ; plain rounding is measured beside it, and the nearer one taken."""
        return quantizer.nearest_of_groups(self.name, schemes)

    def observe(
        self, quantizer: Quantizer, schemes: dict[str, LayerScheme], observer: str
    ) -> QuantizedStateDict:
        """Round by GPTQ, or to nearest."""
        return quantizer.grouped(self.name, schemes, observer)


METHOD = Int4WeightOnly()
