"""`jaxgpt-export quantize`: the float32 artifact -> an INT8 artifact.

    jaxgpt-export quantize --artifact ART --method dynamic|static --data DATA --out ART8

Weights, embedding and head become int8 with one step a row. Inputs are rounded at run time with a step a
token (dynamic), or with a step a layer that is calibrated on the training split (static). For static,
three observers are tried on the model as a whole and the one nearest to the float model is kept.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of
from jaxgpt.tokens import Dataset, open_dataset, windows
from jaxtyping import Int32
from torch import Tensor

from export.artifact import Artifact, Quantization, Tensors, int8_model, read_artifact, write_artifact
from export.certificate import (
    altered_files,
    measure,
    read_certificate,
    read_probe,
    versions,
    write_certificate,
    write_probe,
)
from export.layers import exact_kernels
from export.model import GPT
from export.quality import Quality, batches, measure_quality
from export.quantize.calibration import COVERED, STRENGTHS, InputPlan, LayerInput, collect_inputs, plan_input
from export.quantize.rounding import HEAD, int8_tensors

CALIBRATION_TOKENS = 8192
CHOICE_TOKENS = 4096  # of the training split, not those of the calibration: they choose the observer
QUALITY_TOKENS = 16_384  # of the validation split, for the certificate
MIN_CALIBRATION_TOKENS = 512

# name -> (shares of the largest value to try, smoothing strengths to try)
OBSERVERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "min-max": ((1.0,), ()),
    "clipped": (COVERED, ()),
    "clipped and smoothed": (COVERED, STRENGTHS),
}


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Make an INT8 artifact from a float32 one.

    Attributes:
      artifact: the float32 artifact.
      method: dynamic (a step a token, at run time) or static (a calibrated step a layer).
      out: the INT8 artifact folder to write.
      data: dataset folder: static calibrates on its training split; the cost in loss is measured on its
        validation split. May be left out for dynamic, which then measures on the probe only.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    method: Literal["dynamic", "static"]
    out: Path
    data: Path | None = None
    overwrite: bool = False
    json: bool = False


def quantize(options: QuantizeOptions) -> Result:
    """Run `jaxgpt-export quantize`."""
    inputs = [options.artifact, *([options.data] if options.data else [])]
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    artifact = read_artifact(options.artifact)
    if artifact.quantization is not None:
        raise UserError(f"{options.artifact} is {artifact.kind}; quantize takes the float32 artifact")
    parent = read_certificate(options.artifact)
    if altered := altered_files(options.artifact, parent):
        raise UserError(
            f"{options.artifact} is not what its certificate was made for: {', '.join(altered)} changed; "
            "convert the run again"
        )
    tokenizer = artifact.tokenizer()
    probe = read_probe(artifact)
    dataset = None if options.data is None else open_dataset(options.data)
    if dataset is not None and dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{options.data} was made with another tokenizer ({dataset.tokenizer_sha256[:12]}...) than the "
            f"artifact's ({tokenizer.sha256[:12]}...); give the data set that the model was trained on"
        )
    reference = artifact.model()
    figures: dict[str, Any] = {"method": options.method, "exact_kernels": list(exact_kernels())}
    if options.method == "dynamic":
        tensors = int8_tensors(artifact.config, artifact.tensors)
    else:
        if dataset is None:
            raise UserError("static needs calibration text: give --data, the data set of the run")
        plans, figures["calibration"] = calibrate(artifact, reference, dataset)
        tensors = int8_tensors(artifact.config, artifact.tensors, plans)
    smooth = tuple(sorted(name.removesuffix(".smooth") for name in tensors if name.endswith(".smooth")))
    model = int8_model(artifact.config, tensors)
    figures["parity"] = {**dataclasses.asdict(measure(model, probe)), "against": "Flax fp32"}
    if dataset is not None:
        figures["quality"] = _quality(reference, model, dataset)
    origin = {
        **parent["origin"],
        "parent": str(options.artifact),
        "parent_sha256": sha256_of(options.artifact / "model.safetensors"),
        "quantized_with": versions("torch", "safetensors"),
    }
    quantization = Quantization(options.method, smooth)
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        write_artifact(folder, artifact.config, quantization, tensors, tokenizer)
        write_probe(folder, probe)
        certificate = write_certificate(folder, f"int8-{options.method}", origin, figures)
        size = (folder / "model.safetensors").stat().st_size
    _report(options, artifact, size, figures)
    return Result({"size_mb": size / 1e6, **certificate})


def _report(options: QuantizeOptions, artifact: Artifact, size: int, figures: dict[str, Any]) -> None:
    parity = figures["parity"]
    cost = ""
    if "quality" in figures:
        cost = f"validation loss {figures['quality']['loss_increase']:+.5f} nats, "
    say(
        f"{options.out}: {artifact.file_bytes / 1e6:.2f} -> {size / 1e6:.2f} MB; {cost}"
        f"KL from Flax {parity['kl_mean']:.2e} mean, {parity['kl_max']:.2e} max, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )


def spread_windows(
    tokens: "np.ndarray[Any, np.dtype[np.uint16]]", block_size: int, count: int, shift: int
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
            f"{2 * max(MIN_CALIBRATION_TOKENS, block_size)}; give the data set of the run"
        )
    pairs = np.linspace(0, fit - 1, min(count, fit)).round().astype(int)
    starts = (2 * pairs + shift) * block_size
    return torch.from_numpy(np.stack([tokens[s : s + block_size] for s in starts]).astype(np.int32))


def calibrate(
    artifact: Artifact, reference: GPT, dataset: Dataset
) -> tuple[Mapping[str, InputPlan], dict[str, Any]]:
    """Choose the static inputs of every layer.

    Returns:
      The plans by layer, and the measured comparison of the observers.
    """
    T = artifact.config.block_size
    inputs = collect_inputs(reference, spread_windows(dataset.train, T, max(CALIBRATION_TOKENS // T, 2), 0))
    held_out = spread_windows(dataset.train, T, max(CHOICE_TOKENS // T, 2), 1).numpy()
    choice = list(batches(held_out[:, :-1], held_out[:, 1:], rows=4))
    candidates: dict[str, dict[str, InputPlan]] = {}
    table: dict[str, Any] = {}
    for name, (covered, strengths) in OBSERVERS.items():
        candidates[name] = plan_layers(artifact.tensors, inputs, covered, strengths)
        model = int8_model(artifact.config, int8_tensors(artifact.config, artifact.tensors, candidates[name]))
        quality = measure_quality({"float": reference, name: model}, choice)
        parity = quality[name].parity
        assert parity is not None
        table[name] = {
            "loss_increase": quality[name].loss - quality["float"].loss,
            "kl_mean": parity.kl_mean,
            "kl_max": parity.kl_max,
        }
        say(
            f"observer {name}: loss {table[name]['loss_increase']:+.5f}, KL {parity.kl_mean:.2e} mean, "
            f"{parity.kl_max:.2e} max on held-out training text"
        )
    chosen = min(table, key=lambda name: float(table[name]["kl_mean"]))
    errors = {layer: plan.error for layer, plan in candidates[chosen].items()}
    return candidates[chosen], {"observer": chosen, "observers": table, "layer_errors": errors}


def plan_layers(
    tensors: Tensors,
    inputs: Mapping[str, LayerInput],
    covered: tuple[float, ...],
    strengths: tuple[float, ...],
) -> dict[str, InputPlan]:
    """Choose step and smoothing of every layer on its own."""
    return {
        name: plan_input(
            layer, tensors["wte.weight" if name == HEAD else f"{name}.weight"], covered, strengths
        )
        for name, layer in inputs.items()
    }


def _quality(reference: GPT, model: GPT, dataset: Dataset) -> dict[str, Any]:
    """Measure what the rounding costs on the first tokens of the validation split."""
    T = reference.config.block_size
    inputs, targets = windows(dataset.val, T)
    rows = max(QUALITY_TOKENS // T, 1)
    parts = batches(inputs[:rows], targets[:rows], rows=4)
    quality: dict[str, Quality] = measure_quality({"float": reference, "int8": model}, parts)
    assert quality["int8"].parity is not None
    return {
        "tokens": quality["int8"].tokens,
        "float_loss": quality["float"].loss,
        "int8_loss": quality["int8"].loss,
        "loss_increase": quality["int8"].loss - quality["float"].loss,
        "against_float": dataclasses.asdict(quality["int8"].parity),
    }
