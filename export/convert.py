"""`jaxgpt-export convert`: a run -> the float32 artifact. The only module that knows JAX and PyTorch.

    jaxgpt-export convert --run runs/demo/run --out runs/demo/fp32

Names are a table, layouts agree (Flax kernels and Hugging Face's Conv1D are both (I, O)), so nothing is
folded or transposed; the certificate says how far the module's logits are from Flax's. A run with `qat` gives
its float weights, and in qat.safetensors its input steps with the logits that it computed, rounded.
"""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxgpt.checkpoints import load_params
from jaxgpt.config import ModelConfig
from jaxgpt.model import GPT, LMHead, Numerics, Params, abstract_params, graph_of, merge
from jaxgpt.rounding import (
    INPUT_SCALE,
    RoundedEmbed,
    RoundedLinear,
    round_inputs,
    round_weight,
    without_scales,
)
from jaxgpt.runs import check_tokenizer, open_run
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of
from jaxgpt.shared.huggingface import hf_name
from jaxgpt.tokens import open_dataset
from jaxtyping import Float, Int8, Int32, Integer
from safetensors.torch import save_file
from torch import Tensor

from export.artifact import TRAINED_FILE, Tensors, from_hf_layout, from_hf_name, write_artifact
from export.certificate import (
    MAX_FP32_LOGIT_DIFF,
    Probe,
    probe_positions,
    probe_tokens,
    versions,
    write_certificate,
    write_probe,
)
from export.model import float_model
from export.parity import ParityMeter


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Turn a run's checkpoint into a float32 artifact, a Hugging Face GPT-2 folder with a certificate.

    Attributes:
      run: the run folder.
      out: the artifact folder to write.
      step: best, latest, or a stored step.
      data: dataset folder whose validation split is compared on; the run's own if not given.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    run: Path
    out: Path
    step: str = "best"
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def hf_tensors(params: Params, config: ModelConfig) -> Tensors:
    """Copy Flax parameters into tensors of a Hugging Face GPT-2 file.

    Args:
      params: flat, under GPT-2's names, without input steps.
      config: shape, qat off.

    Raises:
      UserError: names every missing and unexpected parameter.
    """
    expected = abstract_params(config)
    missing, extra = sorted(expected.keys() - params.keys()), sorted(params.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"the checkpoint's parameters do not fit its config: missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    return {hf_name(name): torch.from_numpy(np.array(array, np.float32)) for name, array in params.items()}


def input_scales(params: Params) -> Tensors:
    """Return the input steps of a quantization-aware training: "h.0.attn.c_attn.input_scale", ..."""
    return {
        name: torch.from_numpy(np.array(array, np.float32))
        for name, array in params.items()
        if name.endswith(INPUT_SCALE)
    }


def all_flax_logits(
    config: ModelConfig, params: Params, tokens: Int32[Tensor, "B T"]
) -> Float[Tensor, "N V"]:
    """Return the Flax logits of every position, flattened."""
    graph = graph_of(config)
    forward = jax.jit(lambda params, tokens: merge(graph, params)(tokens))
    with jax.default_matmul_precision("highest"):
        rows = [np.asarray(forward(params, row[None].numpy()))[0] for row in tokens]
    return torch.from_numpy(np.concatenate(rows))


def flax_logits(run_folder: Path, step: int, probe: Probe, rounded: bool = False) -> Float[Tensor, "P V"]:
    """Recompute the Flax logits of a probe from its run; UserError when the step is no longer stored.

    Args:
      run_folder: the run.
      step: of the checkpoint.
      probe: whose tokens and positions are taken.
      rounded: as quantization-aware training computes them, where the run is one.
    """
    run = open_run(run_folder)
    _, params = load_params(run, str(step))
    model = run.config.model
    if not rounded:
        model, params = dataclasses.replace(model, qat=False), without_scales(params)
    return all_flax_logits(model, params, probe.tokens)[probe.positions]


class FlaxModel:
    """A run's best checkpoint, computed by Flax; a `Comparable` of `export.parity`.

    Args:
      folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        run = open_run(folder)
        self.quantized = run.config.model.qat
        self.name, self._config = str(folder), run.config.model
        self.block_size: int | None = run.config.model.block_size
        self._params = load_params(run, "best")[1]
        self._model = merge(graph_of(self._config), self._params)

    def logits(self, tokens: Integer[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of every position."""
        flat = all_flax_logits(self._config, self._params, tokens.to(torch.int32))
        return flat.view(*tokens.shape, -1)

    def outputs(self, tokens: Integer[Tensor, "B T"]) -> dict[str, Float[Tensor, "N O"]]:
        """Return what each layer puts out, computed operator by operator."""
        found: dict[str, Tensor] = {}

        def keep(layer: str, arguments: Any, out: Any) -> None:
            found[layer] = _as_rows(out)  # the outer of two calls of one layer ends last

        kinds = [(kind, "__call__") for kind in (nnx.Linear, nnx.LayerNorm, nnx.Embed)]
        kinds += [(kind, "__call__") for kind in (RoundedLinear, RoundedEmbed)]
        found["lm_head"] = _as_rows(self._watched(tokens, kinds, keep))
        return found

    def inputs(
        self, tokens: Integer[Tensor, "B T"], float64: bool = False
    ) -> dict[str, Float[Tensor, "N I"]]:
        """Return what enters each linear layer that rounds it; nothing unless the run is with `qat`.

        Args:
          tokens: ids.
          float64: of everything but the integers, which are those of float32.
        """
        found: dict[str, Tensor] = {}

        def keep(layer: str, arguments: Any, out: Any) -> None:
            found[layer] = torch.from_numpy(np.array(arguments[0])).flatten(0, -2)

        methods: list[tuple[type, str]] = [(RoundedLinear, "__call__"), (LMHead, "factors")]
        if self.quantized and not float64:
            self._watched(tokens, methods, keep)
        elif self.quantized:
            with jax.enable_x64(True):
                graph = graph_of(self._config, Numerics(jnp.float64, jnp.float64))
                self._watched(tokens, methods, keep, merge(graph, self._as_rounded()))
        return found

    def _as_rounded(self) -> Params:
        """Return float64 parameters whose integers and steps are exactly those of the float32 ones."""
        found = {}
        for name, array in self._params.items():
            kind = name.rpartition(".")[2]
            if kind in ("kernel", "embedding"):
                with jax.enable_x64(False):
                    q, scale = round_weight(array, 0 if kind == "kernel" else 1)
                found[name] = jnp.asarray(np.asarray(q, np.float64) * np.asarray(scale, np.float64))
            else:
                found[name] = jnp.asarray(np.asarray(array, np.float64))
        return found

    def round_input(self, layer: str, x: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Return the integers that a layer makes of an input, compiled as in training."""
        scale = np.asarray(self._params[f"{layer}.{INPUT_SCALE}"])
        with jax.enable_x64(x.dtype == torch.float64):
            q = jax.jit(round_inputs)(jnp.asarray(x.numpy()), jnp.asarray(scale.astype(x.numpy().dtype)))
            return torch.from_numpy(np.array(q))

    def weight_integers(self, layer: str) -> Int8[Tensor, "O I"]:
        """Return the integers of a layer's weights, compiled as in training."""
        name = ("wte.embedding" if self._config.tied else "lm_head.embedding") if layer == "lm_head" else ""
        kernel = self._params[name or f"{layer}.kernel"]
        q = jax.jit(lambda weight: round_weight(weight, 1 if name else 0)[0])(kernel)
        integers = torch.from_numpy(np.array(q)).to(torch.int8)
        return integers if name else integers.t()

    def _watched(
        self,
        tokens: Integer[Tensor, "B T"],
        methods: Sequence[tuple[type, str]],
        keep: Callable[[str, Any, Any], None],
        other: GPT | None = None,
    ) -> jax.Array:
        """Run the model operator by operator; show the calls of some methods, by layer, as they end."""
        model = self._model if other is None else other
        names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}

        def watched(kind: Any, method: str) -> Any:
            original = getattr(kind, method)

            def call(layer: Any, *arguments: Any) -> Any:
                out = original(layer, *arguments)
                keep(names[id(layer)], arguments, out)
                return out

            return unittest.mock.patch.object(kind, method, call)

        with contextlib.ExitStack() as held:
            held.enter_context(jax.default_matmul_precision("highest"))
            for kind, method in methods:
                held.enter_context(watched(kind, method))
            return model(jnp.asarray(tokens.to(torch.int32).numpy()))

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the weight (O, I) and bias of a layer."""
        found = {}
        for name, array in self._params.items():
            stem, _, leaf = name.rpartition(".")
            if stem == ("wte" if layer == "lm_head" else layer):
                tensor = torch.from_numpy(np.array(array, np.float32))
                found["bias" if leaf == "bias" else "weight"] = tensor.t() if leaf == "kernel" else tensor
        return found


def _as_rows(array: Any) -> Float[Tensor, "N O"]:
    return torch.from_numpy(np.array(array, np.float32)).flatten(0, -2)


def convert(options: ConvertOptions) -> Result:
    """Run `jaxgpt-export convert`; exit code 1, and no artifact, when module and Flax differ."""
    check_replaceable(options.out, options.overwrite, "certificate.json", [options.run])
    run = open_run(options.run)
    model = dataclasses.replace(run.config.model, qat=False)
    dataset = open_dataset(options.data or Path(run.config.data["folder"]))
    check_tokenizer(run.config, dataset)
    step, trained = load_params(run, options.step)
    params = without_scales(trained)
    tensors = hf_tensors(params, model)
    tokens = probe_tokens(dataset.val, model.block_size)
    reference = all_flax_logits(model, params, tokens)
    module = float_model(
        model, {from_hf_name(name): from_hf_layout(name, tensor) for name, tensor in tensors.items()}
    )
    meter = ParityMeter()
    with torch.inference_mode():
        for row, expected in zip(tokens, reference.split(model.block_size), strict=True):
            meter.add(expected, module(row[None].long())[0])
    parity = dataclasses.asdict(meter.result())
    if parity["max_abs_logit_diff"] > MAX_FP32_LOGIT_DIFF:
        say(
            f"FAIL  logits of the PyTorch module differ from Flax by {parity['max_abs_logit_diff']:.2e}, "
            f"at most {MAX_FP32_LOGIT_DIFF:.0e} is allowed; no artifact was written"
        )
        return Result({"step": step, "parity": parity}, passed=False)
    positions = probe_positions(tokens.numel(), model.vocab_size)
    origin: dict[str, Any] = {
        "run": str(options.run),
        "step": step,
        "run_config_sha256": sha256_of(options.run / "config.json"),
        "preset": run.config.preset,
        "data": run.config.data,
        "versions": versions("jax", "flax", "torch", "safetensors"),
    }
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        write_artifact(folder, model, None, tensors, run.tokenizer)
        write_probe(folder, Probe(tokens, positions, reference[positions]))
        if run.config.model.qat:
            rounded = all_flax_logits(run.config.model, trained, tokens)[positions]
            save_file({**input_scales(trained), "logits": rounded}, folder / TRAINED_FILE)
        figures = {"parity": {**parity, "positions": tokens.numel(), "against": "Flax fp32"}}
        certificate = write_certificate(folder, "fp32", origin, figures)
        size = (folder / "model.safetensors").stat().st_size
    say(
        f"{options.out}: step {step}, {size / 1e6:.2f} MB; against Flax on {tokens.numel():,} positions: "
        f"max abs logit difference {parity['max_abs_logit_diff']:.2e}, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )
    return Result({"size_mb": size / 1e6, **certificate})
