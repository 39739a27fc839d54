"""int4-weight-only-head: as int4-weight-only, but the head (and the token embedding that it is) has 4 bits.

jaxgpt-export quantize --artifact ART --method int4-weight-only-head --data DATA --out ART4
"""

from typing import ClassVar

from jaxgpt.shared.architecture import HEAD, linear_layers
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods.int4_weight_only import Int4WeightOnly
from jaxgpt_export.quantize.quantizer import group_size_of


class Int4WeightOnlyHead(Int4WeightOnly):
    """4 bits in the blocks and the head, float inputs."""

    aliases: ClassVar[tuple[str, ...]] = ("weight-only-int4-head",)

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the blocks' matrices and the head 4 bits."""
        four = LayerScheme(weight_bits=4, group_size=group_size_of(config))
        return super().schemes(config) | {HEAD: four, linear_layers(config)[HEAD].matrix: four}

    def pinned(self, config: ModelConfig) -> dict[str, str]:
        """Keep no head back: the method without it does that."""
        instead = f"{self.name} rounds the head to 4 bits; to keep it: {self.name.removesuffix('-head')}"
        return {linear_layers(config)[HEAD].matrix: instead}


METHOD = Int4WeightOnlyHead()
