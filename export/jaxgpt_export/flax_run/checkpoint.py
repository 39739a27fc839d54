"""A run's checkpoint: its parameters as an artifact's tensors, and the logits that Flax computes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tensor_file import Arrays
from jaxgpt.shared.tokenizer import Tokenizer
from jaxgpt.training.model.fake_quant import INPUT_SCALE, without_scales
from jaxgpt.training.model.params import Params, graph_of, merge
from jaxgpt.training.run.checkpoints import load_params
from jaxgpt.training.run.folder import Run, check_tokenizer, open_run, read_run_config


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
      run: the run that it is of.
      step: of the training.
      params: flat, under Flax's names.
    """

    run: Run
    step: int
    params: Params

    @property
    def model(self) -> ModelConfig:
        """Shape of the float model: without fake quantization."""
        return dataclasses.replace(self.run.config.model, qat=False)

    @property
    def fake_quantized(self) -> bool:
        """Whether the training rounded weights and inputs."""
        return self.run.config.model.qat

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return self.run.tokenizer

    @property
    def preset(self) -> str:
        """The preset that the run began from."""
        return self.run.config.preset

    @property
    def data(self) -> dict[str, Any]:
        """What the run's config.json says of the data that this checkpoint was trained on."""
        return self.run.config.data_at(self.step)

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """What was changed on purpose in the run before this step."""
        return [each for each in self.run.config.overrides if each["step"] < self.step]

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise UserError unless a data set was made with the tokenizer of the run."""
        check_tokenizer(self.run.config, dataset)

    def tensors(self) -> Arrays:
        """Copy the parameters into tensors of a Hugging Face GPT-2 file."""
        return hf_tensors(without_scales(self.params), self.model)

    def input_scales(self) -> Arrays:
        """Return the trained scales of inputs, "h.0.attn.c_attn.input_scale", ...; empty without them."""
        scales = {name: array for name, array in self.params.items() if name.endswith(INPUT_SCALE)}
        return {name: np.array(array, np.float32) for name, array in scales.items()}

    def logits(self, tokens: npt.NDArray[np.int32], rounded: bool = False) -> npt.NDArray[np.float32]:
        """Return the logits (B T, V) of every position of tokens (B, T).

        Args:
          tokens: ids.
          rounded: as quantization-aware training computes them, where the run is one.
        """
        if rounded:
            return flax_logits(self.run.config.model, self.params, tokens)
        return flax_logits(self.model, without_scales(self.params), tokens)


def read_checkpoint(folder: Path, which: str) -> Checkpoint:
    """Read a checkpoint of a run: best, latest or a step; UserError when it is not stored."""
    run = open_run(folder)
    step, params = load_params(run, which)
    return Checkpoint(run, step, params)


def config_hashes(folder: Path) -> set[str]:
    """Return the hashes of a run's config.json, now and before each time that it was overridden."""
    overrides = read_run_config(folder).overrides
    return {sha256_of(folder / "config.json"), *(str(each["config_sha256"]) for each in overrides)}


def hf_tensors(params: Params, config: ModelConfig) -> Arrays:
    """Copy Flax parameters into tensors of a Hugging Face GPT-2 file.

    Args:
      params: flat, under GPT-2's names, without the scales of fake quantization.
      config: shape.

    Raises:
      UserError: names every missing and unexpected parameter.
    """
    names = {each.flax_name: each.hf_name for each in parameters(config)}
    missing, extra = sorted(names.keys() - params.keys()), sorted(params.keys() - names.keys())
    if missing or extra:
        raise UserError(
            f"the checkpoint's parameters do not fit its config: missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    return {names[name]: np.array(array, np.float32) for name, array in params.items()}


def flax_logits(
    config: ModelConfig, params: Params, tokens: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Return the logits (B T, V) that Flax gives for tokens (B, T), row after row."""
    graph = graph_of(config)
    forward = jax.jit(lambda params, tokens: merge(graph, params)(tokens))
    with jax.default_matmul_precision("highest"):
        return np.concatenate([np.asarray(forward(params, row[None]))[0] for row in tokens])
