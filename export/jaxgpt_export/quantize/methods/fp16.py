"""fp16: weights in float16, half of the size; inputs and sums stay float32. Needs no text.

jaxgpt-export quantize --artifact ART --method fp16 --out ART16
"""

from typing import ClassVar

import numpy as np
from jaxgpt.shared.architecture import HEAD, matrices
from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.quantize.methods import Method
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

LARGEST = float(np.finfo(np.float16).max)


class Fp16(Method):
    """Weights in float16."""

    chosen_by_auto: ClassVar[bool] = False  # it rounds nothing to integers, and would end every search

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Give every matrix 16 bits."""
        return dict.fromkeys((*matrices(config), HEAD), LayerScheme(weight_bits=16))

    def obstacle(self, artifact: Artifact) -> str | None:
        """Refuse weights that float16 has no number for."""
        for name in matrices(artifact.config):
            largest = float(abs(artifact.tensors[f"{name}.weight"]).max())
            if largest > LARGEST:
                found = f"{name} holds a weight of {largest:.3g}, float16 ends at {LARGEST:.0f}"
                return f"{found}; take another method"
        return None

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Round to the nearest float16."""
        return quantizer.candidate(self.name, schemes)


METHOD = Fp16()
