"""int4-dynamic-head: as int4-dynamic, but the head (and the token embedding that it is) has 4 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic-head --data DATA --out ART4
"""

import dataclasses
from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods import uniform_schemes
from jaxgpt_export.quantize.methods.int4_weight_only_head import Int4WeightOnlyHead


class Int4DynamicHead(Int4WeightOnlyHead):
    """4 bits in the blocks and the head, a scale a token at run time."""

    aliases: ClassVar[tuple[str, ...]] = ()

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the weights of int4-weight-only-head, and round every input."""
        rounded = uniform_schemes(config, "dynamic")
        return {
            name: dataclasses.replace(scheme, activation=rounded[name].activation)
            for name, scheme in super().schemes(config).items()
        }


METHOD = Int4DynamicHead()
