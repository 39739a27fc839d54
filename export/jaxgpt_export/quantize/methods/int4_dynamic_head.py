"""int4-dynamic-head: as int4-dynamic, but the head (and the token embedding that it is) has 4 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic-head --data DATA --out ART4
"""

from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods.int4_dynamic import too_wide, with_rounded_inputs
from jaxgpt_export.quantize.methods.int4_weight_only_head import Int4WeightOnlyHead


class Int4DynamicHead(Int4WeightOnlyHead):
    """4 bits in the blocks and the head, a scale a token at run time."""

    aliases: ClassVar[tuple[str, ...]] = ()

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the weights of int4-weight-only-head, and round every input."""
        return with_rounded_inputs(super().schemes(config), config)

    def obstacle(self, artifact: Artifact) -> str | None:
        """Refuse layers so wide that 32 bits do not hold their sums, and what 4 bits refuse anyway."""
        return super().obstacle(artifact) or too_wide(artifact.config)


METHOD = Int4DynamicHead()
