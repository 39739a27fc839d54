"""What the methods of quantization share: calibration, and candidates compared as whole models.

With calibration text 8-bit weights are rounded by GPTQ and the inputs that count most are rounded twice
(two_level), where that helps. Where there is a choice, candidates are compared on training text that
calibration did not see, and the one nearest to the float model in KL is kept.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset, ShardedTokens, Tokens
from jaxgpt.shared.errors import UserError
from jaxtyping import Int32
from torch import Tensor

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.scheme import FLOAT32, has_factors
from jaxgpt_export.model.arithmetic import dequantize, pack_int4
from jaxgpt_export.model.build import as_tensors, float_model
from jaxgpt_export.parity.metrics import Parity
from jaxgpt_export.parity.quality import Forward, batches, measure_quality
from jaxgpt_export.quantize.activation import ActivationQuant, Search, search_scale
from jaxgpt_export.quantize.calibration import LayerInput, collect_inputs
from jaxgpt_export.quantize.gptq import Rounded, gptq, round_groups
from jaxgpt_export.quantize.layer_order import round_in_order
from jaxgpt_export.quantize.state_dict import QuantizedStateDict, Schemes, quantized_state_dict

CALIBRATION_TOKENS = 8192
GPTQ_TOKENS = 32_768  # second moments of 3072 channels need more than scales do
CHOICE_TOKENS = 4096  # of the training split, not those of the calibration
MIN_CALIBRATION_TOKENS = 512
GROUP_SIZE = 32
GROUP_ROUNDINGS = ("gptq", "nearest")

# Candidate's name -> how its inputs' scales and smoothing are searched; None: no input is rounded.
Searches = Mapping[str, Search | None]


class Quantizer:
    """Rounds a float32 artifact; calibration is done once and shared by all methods.

    Args:
      artifact: float32.
      dataset: calibration and choice take its training split; None where there is none.

    Attributes:
      artifact: the same.
      config: its shape.
      reference: its module.
    """

    def __init__(self, artifact: Artifact, dataset: Dataset | None) -> None:
        self.artifact, self.config, self._dataset = artifact, artifact.config, dataset
        self._tensors = as_tensors(artifact.tensors)
        self.reference = float_model(self.config, self._tensors)
        self._inputs: dict[str, LayerInput] | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is text to calibrate on."""
        return self._dataset is not None

    def candidate(
        self,
        method: str,
        schemes: Schemes,
        activations: Mapping[str, ActivationQuant] | None = None,
        groups: Mapping[str, Rounded] | None = None,
        *,
        use_gptq: bool = False,
        two_level: Collection[str] = (),
        trained: bool = False,
    ) -> QuantizedStateDict:
        """Round the model.

        Args:
          method: the label.
          schemes: of every embedding and linear layer.
          activations: how the inputs of layers are quantized.
          groups: integers and scales of the layers with 4 bits; by GPTQ if not given.
          use_gptq: round 8 bits by GPTQ, not to nearest.
          two_level: layers whose inputs are rounded twice.
          trained: the scales of inputs are those of a quantization-aware training.
        """
        if groups is None:
            groups = self._groups(schemes, GROUP_ROUNDINGS[0])
        moments = {name: seen.moments for name, seen in self._seen().items()} if use_gptq else None
        arguments = (method, schemes, activations, groups, moments, two_level)
        found = quantized_state_dict(self.config, self._tensors, *arguments)
        return dataclasses.replace(found, trained=trained)

    def only(self, candidate: QuantizedStateDict, matrix: str) -> QuantizedStateDict:
        """Return the same rounding of one matrix, with every other one in float32."""
        linear, schemes = linear_layers(self.config), candidate.quantization.layers
        here = {name for name in schemes if (linear[name].matrix if name in linear else name) == matrix}
        return self.candidate(
            candidate.quantization.method,
            {name: scheme if name in here else FLOAT32 for name, scheme in schemes.items()},
            candidate.activations,
            candidate.groups,
            use_gptq=candidate.gptq,
            two_level=[name for name, scheme in schemes.items() if scheme.two_level],
        )

    def nearest_to_float(self, method: str, schemes: Schemes, searches: Searches) -> QuantizedStateDict:
        """Try every search on the whole model, then GPTQ and inputs of two levels; keep the nearest."""
        groups = self._groups(schemes, GROUP_ROUNDINGS[0])
        candidates = {
            name: self.candidate(method, schemes, self._searched(search), groups)
            for name, search in searches.items()
        }
        table = self._compare(method, candidates)
        best = _nearest(table)
        activations = candidates[best].activations
        more = {f"{best}, gptq": self.candidate(method, schemes, activations, groups, use_gptq=True)}
        if activations:
            layers = two_level_layers(self.config)
            more[f"{best}, gptq, fine"] = self.candidate(
                method, schemes, activations, groups, use_gptq=True, two_level=layers
            )
        table |= self._compare(method, more)
        chosen = _nearest(table)
        calibration: dict[str, Any] = {"observer": chosen, "observers": table}
        calibration["layer_errors"] = {layer: each.error for layer, each in activations.items()}
        return dataclasses.replace((candidates | more)[chosen], figures={"calibration": calibration})

    def observed(
        self, method: str, schemes: Schemes, searches: Searches, observer: str
    ) -> QuantizedStateDict:
        """Round with one of the searches, whatever it costs."""
        found = self.candidate(method, schemes, self._searched(searches[observer]))
        return dataclasses.replace(found, figures={"calibration": {"observer": observer}})

    def nearest_of_groups(self, method: str, schemes: Schemes) -> QuantizedStateDict:
        """Round 4 bits by GPTQ and to nearest; keep the nearer to float."""
        candidates = {
            name: self.candidate(method, schemes, groups=self._groups(schemes, name))
            for name in GROUP_ROUNDINGS
        }
        table = self._compare(method, candidates)
        chosen = _nearest(table)
        calibration = {"observer": chosen, "observers": table}
        return dataclasses.replace(candidates[chosen], figures={"calibration": calibration})

    def grouped(self, method: str, schemes: Schemes, rounding: str) -> QuantizedStateDict:
        """Round 4 bits in one of GROUP_ROUNDINGS, whatever it costs."""
        found = self.candidate(method, schemes, groups=self._groups(schemes, rounding))
        return dataclasses.replace(found, figures={"calibration": {"observer": rounding}})

    def cost(self, candidate: QuantizedStateDict) -> tuple[float, Parity]:
        """Return the loss above float and the distance from it, on held-out training text."""
        return self._costs({"candidate": candidate})["candidate"]

    def _searched(self, search: Search | None) -> dict[str, ActivationQuant]:
        if search is None:
            return {}
        linear = linear_layers(self.config)
        return {
            name: search_scale(seen, self._tensors[f"{linear[name].matrix}.weight"], search)
            for name, seen in self._seen().items()
        }

    def _seen(self) -> dict[str, LayerInput]:
        if self._inputs is None:
            text = self._text(CALIBRATION_TOKENS, 0)
            say(f"calibrating: what enters each layer on {text.numel():,} training tokens")
            self._inputs = collect_inputs(self.reference, text)
        return self._inputs

    def _text(self, tokens: int, shift: int) -> Int32[Tensor, "B T"]:
        if self._dataset is None:
            raise UserError("this method needs calibration text: give --data, the data set of the run")
        T = self.config.block_size
        if T < 2:
            raise UserError(
                "calibration predicts a token from the ones before, the model's context is 1 token"
            )
        return spread_windows(self._dataset.train, T, max(tokens // T, 2), shift)

    def _groups(self, schemes: Schemes, rounding: str) -> dict[str, Rounded]:
        """Return integers and scales of the matrices with 4 bits, by GPTQ layer after layer or to nearest."""
        tensors = self._tensors
        sizes = {
            name: scheme.group_size
            for name, scheme in schemes.items()
            if scheme.weight_bits == 4 and f"{name}.weight" in tensors
        }
        if not sizes:
            return {}
        factors = {name: has_factors(name, schemes, self.config) for name in sizes}
        if rounding == "nearest":
            return {
                name: round_groups(tensors[f"{name}.weight"], size, factors[name])
                for name, size in sizes.items()
            }
        groups: dict[str, Rounded] = {}

        def round_layer(name: str, weight: Tensor, moments: Tensor) -> Tensor:
            if name not in sizes:
                return weight
            groups[name] = found = gptq(weight, moments, sizes[name], factors[name])
            return dequantize(pack_int4(found.q), found.scale, found.factor)

        text = self._text(GPTQ_TOKENS, 0)
        shown = ", ".join(map(str, sorted(set(sizes.values()))))
        say(f"4 bits: GPTQ on {text.numel():,} tokens, groups of {shown}")
        round_in_order(self.config, tensors, text, round_layer)
        return groups

    def _compare(
        self, method: str, candidates: Mapping[str, QuantizedStateDict]
    ) -> dict[str, dict[str, float]]:
        """Measure candidates on text that calibration did not see."""
        say(f"{method}: comparing {' | '.join(candidates)} with float")
        table = {}
        for name, (increase, parity) in self._costs(candidates).items():
            table[name] = {"loss_increase": increase, "kl_mean": parity.kl_mean, "kl_max": parity.kl_max}
            say(
                f"{method}, {name}: loss {increase:+.5f}, KL {parity.kl_mean:.2e} mean, "
                f"{parity.kl_max:.2e} max on held-out training text"
            )
        return table

    def _costs(self, candidates: Mapping[str, QuantizedStateDict]) -> dict[str, tuple[float, Parity]]:
        held_out = self._text(CHOICE_TOKENS, 1).numpy()
        choice = batches(held_out[:, :-1], held_out[:, 1:], rows=4)
        models: dict[str, Forward] = {
            "float": self.reference,
            **{name: each.model(self.config) for name, each in candidates.items()},
        }
        quality = measure_quality(models, choice)
        loss = quality.pop("float").loss
        return {name: (each.loss - loss, each.parity) for name, each in quality.items() if each.parity}


def _nearest(table: Mapping[str, Mapping[str, float]]) -> str:
    return min(table, key=lambda name: table[name]["kl_mean"])


def group_size_of(config: ModelConfig) -> int:
    """Return how many input channels share a scale of 4-bit weights: 32, or less where 32 does not divide.

    Raises:
      UserError: the number of channels is odd.
    """
    size = GROUP_SIZE
    while config.n_embd % size:
        size //= 2
    if size < 2:
        raise UserError(f"4-bit weights need an even number of channels, n_embd is {config.n_embd}")
    return size


def spread_windows(
    tokens: Tokens | ShardedTokens, block_size: int, count: int, shift: int
) -> Int32[Tensor, "B T"]:
    """Cut windows evenly spread over a split; another shift (0 or 1) gives windows that don't overlap them.

    Args:
      tokens: (N,).
      block_size: T.
      count: number of windows wanted; fewer where the split is short.
      shift: 0 or 1.

    Raises:
      UserError: the split is too short to calibrate on.
    """
    fit = len(tokens) // (2 * block_size)
    if fit * block_size < MIN_CALIBRATION_TOKENS:
        raise UserError(
            f"the training split has {len(tokens)} tokens, calibration needs at least "
            f"{2 * block_size * -(-MIN_CALIBRATION_TOKENS // block_size)}; give the data set of the run"
        )
    pairs = np.linspace(0, fit - 1, min(count, fit)).round().astype(int)
    starts = (2 * pairs + shift) * block_size
    return torch.from_numpy(np.stack([tokens[s : s + block_size] for s in starts]).astype(np.int32))


def two_level_layers(config: ModelConfig) -> list[str]:
    """Return the layers whose inputs may be rounded twice: all but mlp.c_fc, where it brings least.

    Measured on a model of 5.9 million parameters, dynamic inputs, KL from float: 6.2e-4 with none, 4.6e-4
    with the head, 3.1e-4 with c_attn too, 2.2e-4 with mlp.c_proj too, 1.5e-4 with attn.c_proj too, 1.2e-4
    with all.
    """
    return [name for name, layer in linear_layers(config).items() if layer.name_in_block != "mlp.c_fc"]
