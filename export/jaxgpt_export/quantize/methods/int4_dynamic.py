"""int4-dynamic: 4 bits in groups by GPTQ, each token's input rounded to 8; embeddings and head keep 8 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic --data DATA --out ART4
"""

import dataclasses
from typing import ClassVar

from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import MAX_INT4_INPUT_FEATURES, LayerScheme
from jaxgpt_export.quantize.methods import Method
from jaxgpt_export.quantize.methods.int4_weight_only import Int4WeightOnly


class RoundedInputs(Method):
    """What a method of 4 bits becomes whose linear layers round each token's input to 8 bits."""

    aliases: ClassVar[tuple[str, ...]] = ()

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the weights of the method beside it, and round every input."""
        linear = linear_layers(config)
        return {
            name: dataclasses.replace(scheme, activation="dynamic") if name in linear else scheme
            for name, scheme in super().schemes(config).items()
        }

    def obstacle(self, artifact: Artifact) -> str | None:
        """Refuse layers so wide that 32 bits do not hold their sums, and what 4 bits refuse anyway."""
        widest = max(layer.inputs for layer in linear_layers(artifact.config).values())
        if widest > MAX_INT4_INPUT_FEATURES:
            most = MAX_INT4_INPUT_FEATURES
            return f"4 bits beside rounded inputs end at {most} inputs, a layer here has {widest}"
        return super().obstacle(artifact)


class Int4Dynamic(RoundedInputs, Int4WeightOnly):
    """4 bits in the blocks, a scale a token at run time."""


METHOD = Int4Dynamic()
