"""The models that `jaxgpt-bench quality` measures on the same tokens."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxgpt_export.format.artifact import Artifact, read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import build_model
from jaxgpt_export.parity.quality import Forward

from jaxgpt.generation.session import Session
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import Tokenizer

QAT, QAT_PARENT = "int8-static-qat", "fp32-qat"


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """A model whose loss is compared with others'.

    Attributes:
      name: of its row.
      forward: logits for tokens.
      session: to sample with.
      size_mb: of its file.
      parent: row of the float32 artifact that it was made of, where that is not the first row.
    """

    name: str
    forward: Forward
    session: Session
    size_mb: float
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class ComparedModels:
    """Models of one tokenizer and context, the reference first."""

    models: list[ComparedModel]
    tokenizer: Tokenizer
    block_size: int


def model_name(artifact: Artifact) -> str:
    """Return the name of an artifact's row."""
    if artifact.quantization is not None:
        return artifact.kind
    return QAT_PARENT if artifact.trained else "torch-fp32"


def parent_name(artifact: Artifact, artifacts: Sequence[Artifact]) -> str | None:
    """Return the row that int8-static-qat was quantized from, where it is measured before it.

    Raises:
      UserError: it was quantized from another.
    """
    earlier = itertools.takewhile(lambda other: other is not artifact, artifacts)
    parent = next((other for other in earlier if model_name(other) == QAT_PARENT), None)
    if model_name(artifact) != QAT or parent is None:
        return None
    origin = read_certificate(artifact.folder)["origin"]
    if origin.get("parent_sha256") != sha256_of(parent.folder / "model.safetensors"):
        raise UserError(f"{artifact.folder} was not made of {parent.folder}; give what belongs together")
    return QAT_PARENT


def flax_model(folder: Path, which: str) -> tuple[ComparedModel, Tokenizer]:
    """Return a run's Flax model; its size is that of its parameters in float32."""
    import jax

    from jaxgpt.training.flax_session import FlaxSession
    from jaxgpt.training.model.params import graph_of, merge
    from jaxgpt.training.run.checkpoints import load_params
    from jaxgpt.training.run.folder import open_run

    run = open_run(folder)
    model = run.config.model
    _, params = load_params(run, which)
    graph = graph_of(model)
    compiled = jax.jit(lambda params, tokens: merge(graph, params)(tokens))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        with jax.default_matmul_precision("highest"):
            return torch.from_numpy(np.array(compiled(params, tokens.int().numpy())))

    size_mb = sum(leaf.nbytes for leaf in params.values()) / 1e6
    return ComparedModel("flax-fp32", forward, FlaxSession(model, params), size_mb), run.tokenizer


def open_models(folders: Sequence[Path], dataset: Dataset, run: Path | None, step: str) -> ComparedModels:
    """Open every model.

    Args:
      folders: artifacts, float32 first.
      dataset: that they are measured on.
      run: whose Flax model becomes the first, or None.
      step: of the run.

    Raises:
      UserError: two do not share tokenizer, vocabulary and context.
    """
    artifacts = [read_artifact(folder) for folder in folders]
    if not artifacts:
        raise UserError("quality needs at least one --artifact")
    found = [
        ComparedModel(
            model_name(artifact),
            (model := build_model(artifact)),
            TorchSession(model),
            artifact.file_bytes / 1e6,
            parent_name(artifact, artifacts),
        )
        for artifact in artifacts
    ]
    tokenizers = [artifact.tokenizer() for artifact in artifacts]
    if run is not None:
        flax, tokenizer = flax_model(run, step)
        found.insert(0, flax)
        tokenizers.insert(0, tokenizer)
    if len({t.sha256 for t in tokenizers} | {dataset.tokenizer_sha256}) != 1:
        raise UserError("tokenizers of data, run and artifacts differ; give what belongs together")
    blocks = {artifact.config.block_size for artifact in artifacts}
    if len(blocks) != 1 or len({c.name for c in found}) != len(found):
        raise UserError("artifacts must be of one model, each of another kind")
    return ComparedModels(found, tokenizers[0], blocks.pop())
