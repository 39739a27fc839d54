"""Where a training begins when it does not begin anew: `jaxgpt train PRESET --init FOLDER`.

    jaxgpt train small --data DATA --init runs/demo/run --qat --out runs/demo/qat

FOLDER is a run, whose best checkpoint is taken, or a float32 artifact, which is a Hugging Face GPT-2 folder
(config.json, model.safetensors, merges.txt, vocab.json). It is read without PyTorch and checked whole.
"""

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import as_path, read_json, sha256_of
from jaxgpt.shared.huggingface import MODEL_TYPE, OWN_MODEL_TYPE, read_hf_config
from jaxgpt.shared.tensor_file import dtype_name, read_tensor_file
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.training.devices.processes import all_agree
from jaxgpt.training.model.fake_quant import without_scales
from jaxgpt.training.model.params import HostParams
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import Run, open_run, stored_steps

WPE = "wpe.embedding"


@dataclasses.dataclass(frozen=True)
class InitSource:
    """A folder that a training begins with, opened but not yet read.

    Attributes:
      folder: where it lies.
      model: shape of what it holds.
      tokenizer: that it was trained with.
      run: the run that it is; None for an artifact.
      sha256: identity: hash of model.safetensors, or of the run's config.json.
      known: what config.json of the run that is resumed says of it, whose checkpoints hold what became of it;
        None where the folder itself was opened.
    """

    folder: Path
    model: ModelConfig
    tokenizer: Tokenizer
    run: Run | None
    sha256: str
    known: dict[str, Any] | None = None

    @property
    def kind(self) -> Literal["run", "artifact"]:
        """What it is."""
        return "artifact" if self.run is None else "run"

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise UserError unless a data set was made with this tokenizer."""
        where = self.folder if self.run is None else self.folder / "tokenizer"
        if self.tokenizer.sha256 != dataset.tokenizer_sha256:
            raise UserError(
                f"tokenizer of {self.folder} ({self.tokenizer.sha256[:12]}..., {self.tokenizer.vocab_size} "
                f"tokens) is not the one of {dataset.folder} ({dataset.tokenizer_sha256[:12]}..., "
                f"{dataset.vocab_size} tokens); prepare data for it with: jaxgpt prepare --tokenizer {where}"
            )

    def read(self, model: ModelConfig) -> tuple[HostParams, dict[str, Any]]:
        """Read and check the parameters.

        A run trained again with the same settings has the same config.json and other parameters, so what is
        said of a run has their hash too.

        Args:
          model: what is trained: of the same shape, with at most as long a context. Input scales are left
            out where it has none.

        Returns:
          The parameters in the memory of the host, and what the new run's config.json says of them.

        Raises:
          UserError: a model of another shape, or parameters that are not finite.
        """
        if self.known is not None:
            return open_init_source(self.folder).read(model)
        self._require_same_shape(model)
        step = None
        more: dict[str, str] = {}
        if self.run is None:
            params = _read_tensors(self.folder / "model.safetensors", self.model)
        else:
            step, arrays = load_params(self.run, "best")
            params = {name: np.asarray(array) for name, array in arrays.items()}
            for name, array in params.items():
                _require_finite(f"{self.folder} step {step}", name, array)
            more = {"params_sha256": _sha256_of(params)}
        if WPE in params:
            params[WPE] = params[WPE][: model.block_size]
        if not model.qat:
            params = without_scales(params)
        entry = {
            "folder": str(self.folder.absolute()),
            "kind": self.kind,
            "step": step,
            "sha256": self.sha256,
        }
        return params, {**entry, **more}

    def _require_same_shape(self, model: ModelConfig) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "positions", "tied"):
            there, given = getattr(self.model, name), getattr(model, name)
            if given != there:
                raise UserError(
                    f"{name} is {given!r}, the model of {self.folder} has {there!r}; take the shape of the "
                    "model that the training begins with"
                )
        if model.block_size > self.model.block_size:
            raise UserError(
                f"block_size is {model.block_size}, the model of {self.folder} has {self.model.block_size} "
                "positions; give at most so many"
            )


def open_init_source(folder: Path | str, resumed: Path | None = None) -> InitSource:
    """Open a run or a float32 artifact; JAX's devices are not touched.

    Args:
      folder: where it lies.
      resumed: a run folder. Where it has checkpoints and began with this folder, the folder is not looked at,
        which may hold something else by now, or be gone.

    Raises:
      UserError: it is neither, or a model that is not trained here.
    """
    folder = as_path(folder, "--init")
    known = None if resumed is None else _as_run_knows(folder, resumed)
    if known is not None:
        return known
    if not folder.is_dir():
        raise UserError(f"--init {folder} is no folder; expected a run or a float32 artifact")
    path = folder / "config.json"
    value = read_json(path, "configuration of --init")
    if "format_version" in value and "model_type" not in value:
        run = open_run(folder)
        return InitSource(folder, run.config.model, run.tokenizer, run, sha256_of(path))
    model = _model_config(path)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"tokenizer of {folder} has {tokenizer.vocab_size} tokens, its model {model.vocab_size}; "
            "the folder mixes two models"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} is missing; --init needs a run or a whole float32 artifact")
    return InitSource(folder, model, tokenizer, None, sha256_of(weights))


def _as_run_knows(folder: Path, resumed: Path) -> InitSource | None:
    """Return what a run that has checkpoints began with, if that was this folder."""
    with contextlib.suppress(UserError):  # which is told when the run is opened
        run = open_run(resumed)
        entry = run.config.init
        if entry and stored_steps(resumed) and os.path.abspath(entry["folder"]) == os.path.abspath(folder):
            return InitSource(folder, run.config.model, run.tokenizer, None, entry["sha256"], entry)
    return None


def as_all_know(source: InitSource | None) -> InitSource | None:
    """Return what a training begins with, opened itself unless it is known to every process."""
    if source is None or all_agree(source.known is not None) or source.known is None:
        return source
    return open_init_source(source.folder)


def _model_config(path: Path) -> ModelConfig:
    said = read_hf_config(path, "configuration of --init")
    if said.quantization is not None:
        raise UserError(
            f"{path} is of a quantized artifact, whose integers can't be trained; give --init the run or the "
            "float32 artifact that it was made of"
        )
    if said.is_plain != (said.model.positions == "learned"):
        raise UserError(
            f"{path} has model_type {said.model_type!r} and positions {said.model.positions!r}, expected "
            f"{MODEL_TYPE} with learned or {OWN_MODEL_TYPE} with rotary ones; --init takes a run or a "
            "float32 artifact"
        )
    return said.model


def _read_tensors(path: Path, model: ModelConfig) -> HostParams:
    """Read model.safetensors into parameters under their Flax names."""
    try:
        tensors = read_tensor_file(path)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} can't be read ({type(error).__name__}: {line}); expected a whole file of float32 tensors"
        ) from None
    expected = {each.hf_name: each for each in parameters(model)}
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit its config.json: missing tensors: {', '.join(missing) or 'none'}; "
            f"unexpected tensors: {', '.join(extra) or 'none'}; take a folder that was written whole"
        )
    params = {}
    for theirs, parameter in expected.items():
        tensor = tensors[theirs]
        if tensor.dtype != np.float32 or tensor.shape != parameter.hf_shape:
            raise UserError(
                f"{path}: {theirs} is {dtype_name(tensor.dtype)} {tensor.shape}, expected float32 "
                f"{parameter.hf_shape}; it does not fit its config.json, or was saved in another precision"
            )
        _require_finite(str(path), theirs, tensor)
        params[parameter.flax_name] = tensor
    return params


def _sha256_of(params: HostParams) -> str:
    """Return the hash of parameters, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(params):
        found.update(f"{name} {params[name].shape}".encode())
        found.update(params[name].tobytes())
    return found.hexdigest()


def _require_finite(where: str, name: str, array: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds NaN or infinity; take another --init")
