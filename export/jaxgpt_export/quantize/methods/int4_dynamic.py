"""int4-dynamic: 4 bits in groups by GPTQ, each token's input rounded to 8; embeddings and head keep 8 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic --data DATA --out ART4
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import MAX_INT4_INPUT_FEATURES, LayerScheme
from jaxgpt_export.quantize.methods.int4_weight_only import Int4WeightOnly


class Int4Dynamic(Int4WeightOnly):
    """4 bits in the blocks, a scale a token at run time."""

    aliases: ClassVar[tuple[str, ...]] = ()

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give the weights of int4-weight-only, and round every input."""
        return with_rounded_inputs(super().schemes(config), config)

    def obstacle(self, artifact: Artifact) -> str | None:
        """Refuse layers so wide that 32 bits do not hold their sums, and what int4-weight-only refuses."""
        return super().obstacle(artifact) or too_wide(artifact.config)


def with_rounded_inputs(schemes: Mapping[str, LayerScheme], config: ModelConfig) -> dict[str, LayerScheme]:
    """Return schemes whose linear layers round each token's input to 8 bits."""
    return {
        name: dataclasses.replace(scheme, activation="dynamic") if name in linear_layers(config) else scheme
        for name, scheme in schemes.items()
    }


def too_wide(config: ModelConfig) -> str | None:
    """Return why a model's layers have too many inputs for 4 bits beside rounded inputs; None where not."""
    widest = max(layer.inputs for layer in linear_layers(config).values())
    if widest <= MAX_INT4_INPUT_FEATURES:
        return None
    return f"4 bits beside rounded inputs end at {MAX_INT4_INPUT_FEATURES} inputs, a layer here has {widest}"


METHOD = Int4Dynamic()
