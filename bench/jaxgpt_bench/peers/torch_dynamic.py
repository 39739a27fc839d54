"""PyTorch's own dynamic INT8, torch.ao.quantization.quantize_dynamic, on Hugging Face's GPT-2."""

import warnings
from pathlib import Path
from typing import ClassVar

from jaxgpt_bench.peers.peer import NO_SETTINGS, PLAIN, Artifact, Prepared, Settings, Variant, weight_bytes
from jaxgpt_bench.peers.transformers_ import Transformers, TransformersSession


class TorchQuantizeDynamic(Transformers):
    """PyTorch's quantize_dynamic on Hugging Face's GPT-2, with its cache.

    It skips Conv1D and a head that shares its matrix with the embedding without a word; both are turned into
    linear layers first.
    """

    engine: ClassVar[str] = "torch-quantize-dynamic"
    precisions: ClassVar[tuple[str, ...]] = ("int8-dynamic",)
    variants: ClassVar[tuple[Variant, ...]] = (PLAIN,)

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Give the artifact's own folder: rounding is done when it is loaded."""
        return Prepared(
            artifact.folder / "model.safetensors",
            weight_bytes(artifact, lambda matrix: float(matrix.size)),
        )

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> TransformersSession:
        """Load the folder and round its weights."""
        import torch

        session = super().open(path, precision, threads, variant)
        for module in list(session.model.modules()):
            for name, layer in list(module.named_children()):
                if type(layer).__name__ == "Conv1D":
                    I, O = layer.weight.shape
                    linear = torch.nn.Linear(I, O)
                    linear.weight = torch.nn.Parameter(layer.weight.t().contiguous())
                    linear.bias = layer.bias
                    setattr(module, name, linear)
        head = session.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated; that is no news of a measurement
            session.model = torch.ao.quantization.quantize_dynamic(
                session.model, {torch.nn.Linear}, dtype=torch.qint8
            )
        return session


PEER = TorchQuantizeDynamic()
