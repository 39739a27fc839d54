"""int4-dynamic: 4 bits in groups by GPTQ, each token's input rounded to 8; embeddings and head keep 8 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic --data DATA --out ART4
"""

import dataclasses
from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods import uniform_schemes
from jaxgpt_export.quantize.methods.int4_weight_only import Int4WeightOnly


class Int4Dynamic(Int4WeightOnly):
    """4 bits in the blocks, a scale a token at run time."""

    aliases: ClassVar[tuple[str, ...]] = ()

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the weights of int4-weight-only, and round every input."""
        rounded = uniform_schemes(config, "dynamic")
        return {
            name: dataclasses.replace(scheme, activation=rounded[name].activation)
            for name, scheme in super().schemes(config).items()
        }


METHOD = Int4Dynamic()
