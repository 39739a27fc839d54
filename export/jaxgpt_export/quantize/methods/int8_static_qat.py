"""int8-static-qat: weights of 8 bits, inputs with the scales that `jaxgpt train --qat` learned.

    jaxgpt-export quantize --artifact ART --method int8-static-qat --data DATA --out ART8

Nothing is chosen here: the artifact computes what the training computed.
"""

from typing import ClassVar

from jaxgpt.shared.config import ModelConfig

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import LayerScheme
from jaxgpt_export.model.build import as_tensors
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.methods import Method, uniform_schemes
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict


class Int8StaticQat(Method):
    """8 bits, trained scales."""

    aliases: ClassVar[tuple[str, ...]] = ("static-qat",)

    def schemes(self, config: ModelConfig) -> dict[str, LayerScheme]:
        """Round every input with a stored scale."""
        return uniform_schemes(config, "static")

    def obstacle(self, artifact: Artifact) -> str | None:
        """Ask for trained scales."""
        if artifact.input_scales:
            return None
        return (
            f"{artifact.folder} holds no trained input scales (qat.safetensors); train with "
            "`jaxgpt train PRESET --init RUN --qat`, convert that run, and quantize its artifact"
        )

    def quantize(self, quantizer: Quantizer, schemes: dict[str, LayerScheme]) -> QuantizedStateDict:
        """Take the trained scales."""
        scales = as_tensors(quantizer.artifact.input_scales)
        activations = {name: ActivationQuant(scale, None, 0.0) for name, scale in scales.items()}
        return quantizer.candidate(self.name, schemes, activations, trained=True)


METHOD = Int8StaticQat()
