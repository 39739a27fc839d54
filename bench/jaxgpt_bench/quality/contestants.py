"""The models that `jaxgpt-bench quality` measures on the same tokens.

Artifacts whose inputs are all rounded to 8 bits are computed by the native engine, with a float32 cache,
where it was built: it gives the module's bits there, in a tenth of its time. Others are computed by the
module, weight-only ones among them, whose inputs the engine rounds and the module does not.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxgpt_export.format.artifact import Artifact, read_certified_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.native_model import NativeModel, unsupported_reason
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.parity.quality import Forward

from jaxgpt.generation.session import Session
from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt_bench.speed.programs import FLAX, NATIVE, TORCH

QAT, QAT_PARENT = "int8-static-qat", "fp32-qat"


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """A model whose loss is compared with others'.

    Attributes:
      name: of its row.
      forward: logits for tokens.
      session: to sample with; None for what writes no samples.
      size_mb: of its file.
      parent: row of the float32 artifact that it was made of, where that is not the first row.
      settings: of the program, where they change what it computes.
      engine: what computes: jaxgpt-native, jaxgpt-torch, jaxgpt-flax or a peer's name.
    """

    name: str
    forward: Forward
    session: Session | None
    size_mb: float
    parent: str | None = None
    settings: dict[str, Any] | None = None
    engine: str | None = None


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


def computed(artifact: Artifact) -> tuple[Forward, Session]:
    """Return what gives the logits of the artifact's module, to the bit, and a session that does."""
    if computing_engine(artifact) == NATIVE.engine:
        engine = NativeModel(artifact)
        return engine_forward(engine), NativeSession(engine, cache="fp32")
    module = build_model(artifact)
    return module, TorchSession(module)


def computing_engine(artifact: Artifact) -> str:
    """Return the program that gives the logits of the artifact's module: jaxgpt-native or jaxgpt-torch."""
    native = engine_is_exact(artifact) and unsupported_reason(artifact) is None
    return (NATIVE if native else TORCH).engine


def engine_is_exact(artifact: Artifact) -> bool:
    """Whether the engine's logits are the module's bits: the inputs of all linear layers are rounded.

    Sums of integers are exact in any order; a layer that multiplies with floats has none of that.
    """
    if artifact.quantization is None:
        return False
    schemes = artifact.quantization.layers
    return all(schemes[name].activation != "float" for name in linear_layers(artifact.config))


def engine_forward(engine: NativeModel) -> Forward:
    """Return the engine as a function from tokens (B, T) to logits (B, T, V)."""
    session = NativeSession(engine, cache="fp32")

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        logits = np.empty((*tokens.shape, engine.config.vocab_size), np.float32)
        for place, window in enumerate(tokens.tolist()):
            session.truncate(0)
            logits[place] = session.forward(window, all_logits=True)
        return torch.from_numpy(logits)

    return forward


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
    session = FlaxSession(model, params)
    return ComparedModel("flax-fp32", forward, session, size_mb, engine=FLAX.engine), run.tokenizer


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
    artifacts = [read_certified_artifact(folder) for folder in folders]
    if not artifacts:
        raise UserError("quality needs at least one --artifact")
    found = [
        ComparedModel(
            model_name(artifact),
            *computed(artifact),
            artifact.file_bytes / 1e6,
            parent_name(artifact, artifacts),
            engine=computing_engine(artifact),
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
