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
from jaxgpt_export.parity.quality import Forward

from jaxgpt.generation.session import Session
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import Tokenizer

QAT, QAT_PARENT = "int8-static-qat", "fp32-qat"


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Compare models on identical tokens.

    Attributes:
      artifact: artifact folders, float32 first; that of a training with rounding before what was made of it.
      data: dataset folder whose validation split is measured.
      run: run folder: its Flax model becomes the reference.
      step: of the run: best, latest, or a stored step.
      tokens: of the validation split, in whole windows spread evenly over it; 0 for all.
      samples: texts to generate from each model.
      sample_tokens: length of a sample at most.
      out: also write the figures into this JSON file.
      table: text whose table between the markers `<!-- quality: begin -->` and `end` is written anew.
      json: print one JSON document with all figures on stdout.
    """

    artifact: tuple[Path, ...]
    data: Path
    run: Path | None = None
    step: str = "best"
    tokens: int = 0
    samples: int = 24
    sample_tokens: int = 200
    out: Path | None = None
    table: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model to compare: logits for tokens, an engine to sample with, its size in MB, its parent's row."""

    name: str
    forward: Forward
    engine: Session
    size_mb: float
    parent: str | None = None


def row_name(artifact: Artifact) -> str:
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
    parent = next((other for other in earlier if row_name(other) == QAT_PARENT), None)
    if row_name(artifact) != QAT or parent is None:
        return None
    origin = read_certificate(artifact.folder)["origin"]
    if origin.get("parent_sha256") != sha256_of(parent.folder / "model.safetensors"):
        raise UserError(f"{artifact.folder} was not made of {parent.folder}; give what belongs together")
    return QAT_PARENT


def flax_contender(folder: Path, which: str) -> tuple[Contender, Tokenizer]:
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
    return Contender("flax-fp32", forward, FlaxSession(model, params), size_mb), run.tokenizer


def contenders(options: QualityOptions, dataset: Dataset) -> tuple[list[Contender], Tokenizer, int]:
    """Open every model; UserError when two do not share tokenizer, vocabulary and context."""
    artifacts = [read_artifact(folder) for folder in options.artifact]
    if not artifacts:
        raise UserError("quality needs at least one --artifact")
    found = [
        Contender(
            row_name(artifact),
            (model := artifact.model()),
            TorchSession(model),
            artifact.file_bytes / 1e6,
            parent_name(artifact, artifacts),
        )
        for artifact in artifacts
    ]
    tokenizers = [artifact.tokenizer() for artifact in artifacts]
    if options.run is not None:
        flax, tokenizer = flax_contender(options.run, options.step)
        found.insert(0, flax)
        tokenizers.insert(0, tokenizer)
    if len({t.sha256 for t in tokenizers} | {dataset.tokenizer_sha256}) != 1:
        raise UserError("tokenizers of data, run and artifacts differ; give what belongs together")
    blocks = {artifact.config.block_size for artifact in artifacts}
    if len(blocks) != 1 or len({c.name for c in found}) != len(found):
        raise UserError("artifacts must be of one model, each of another kind")
    return found, tokenizers[0], blocks.pop()
