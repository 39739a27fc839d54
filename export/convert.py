"""`jaxgpt-export convert`: a run -> the float32 artifact. The only module that knows JAX and PyTorch.

    jaxgpt-export convert --run runs/demo/run --out runs/demo/fp32

Names are a table, layouts agree (Flax kernels and Hugging Face's Conv1D are both (I, O)), so nothing is
folded or transposed; the certificate says how far the module's logits are from Flax's.
"""

import contextlib
import dataclasses
import unittest.mock
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxgpt.checkpoints import load_params
from jaxgpt.config import ModelConfig
from jaxgpt.model import Params, abstract_params, graph_of, merge
from jaxgpt.runs import check_tokenizer, open_run
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of
from jaxgpt.tokens import open_dataset
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from export.artifact import HF_PREFIX, Tensors, from_hf_layout, from_hf_name, write_artifact
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

# The last part of a Flax name -> of the PyTorch name; the rest is GPT-2's own on both sides.
LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


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


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a Flax parameter."""
    stem, _, leaf = name.rpartition(".")
    return f"{HF_PREFIX}{stem}.{LEAF_NAMES[leaf]}"


def hf_tensors(params: Params, config: ModelConfig) -> Tensors:
    """Copy Flax parameters into tensors of a Hugging Face GPT-2 file.

    Args:
      params: flat, under GPT-2's names.
      config: shape.

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


def all_flax_logits(
    config: ModelConfig, params: Params, tokens: Int32[Tensor, "B T"]
) -> Float[Tensor, "N V"]:
    """Return the Flax logits of every position, flattened."""
    graph = graph_of(config)
    forward = jax.jit(lambda params, tokens: merge(graph, params)(tokens))
    with jax.default_matmul_precision("highest"):
        rows = [np.asarray(forward(params, row[None].numpy()))[0] for row in tokens]
    return torch.from_numpy(np.concatenate(rows))


def flax_logits(run_folder: Path, step: int, probe: Probe) -> Float[Tensor, "P V"]:
    """Recompute the Flax logits of a probe from its run; UserError when the step is no longer stored."""
    run = open_run(run_folder)
    _, params = load_params(run, str(step))
    return all_flax_logits(run.config.model, params, probe.tokens)[probe.positions]


class FlaxModel:
    """A run's best checkpoint, computed by Flax; a `Comparable` of `export.parity`.

    Args:
      folder: the run folder.
    """

    quantized = False

    def __init__(self, folder: Path) -> None:
        run = open_run(folder)
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
        names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(self._model)}

        def watched(kind: Any) -> Any:
            original = kind.__call__

            def call(layer: Any, *arguments: Any) -> Any:
                out = original(layer, *arguments)
                found[names[id(layer)]] = torch.from_numpy(np.array(out, np.float32)).flatten(0, -2)
                return out

            return unittest.mock.patch.object(kind, "__call__", call)

        with contextlib.ExitStack() as held:
            held.enter_context(jax.default_matmul_precision("highest"))
            for kind in (nnx.Linear, nnx.LayerNorm, nnx.Embed):
                held.enter_context(watched(kind))
            logits = self._model(jnp.asarray(tokens.to(torch.int32).numpy()))
        found["lm_head"] = torch.from_numpy(np.array(logits, np.float32)).flatten(0, -2)
        return found

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the weight (O, I) and bias of a layer."""
        found = {}
        for name, array in self._params.items():
            stem, _, leaf = name.rpartition(".")
            if stem == ("wte" if layer == "lm_head" else layer):
                tensor = torch.from_numpy(np.array(array, np.float32))
                found["bias" if leaf == "bias" else "weight"] = tensor.t() if leaf == "kernel" else tensor
        return found


def convert(options: ConvertOptions) -> Result:
    """Run `jaxgpt-export convert`; exit code 1, and no artifact, when module and Flax differ."""
    check_replaceable(options.out, options.overwrite, "certificate.json", [options.run])
    run = open_run(options.run)
    model = run.config.model
    dataset = open_dataset(options.data or Path(run.config.data["folder"]))
    check_tokenizer(run.config, dataset)
    step, params = load_params(run, options.step)
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
        figures = {"parity": {**parity, "positions": tokens.numel(), "against": "Flax fp32"}}
        certificate = write_certificate(folder, "fp32", origin, figures)
        size = (folder / "model.safetensors").stat().st_size
    say(
        f"{options.out}: step {step}, {size / 1e6:.2f} MB; against Flax on {tokens.numel():,} positions: "
        f"max abs logit difference {parity['max_abs_logit_diff']:.2e}, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )
    return Result({"size_mb": size / 1e6, **certificate})
