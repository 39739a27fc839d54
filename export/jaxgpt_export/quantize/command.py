"""`jaxgpt-export quantize`: the float32 artifact -> a quantized artifact.

    jaxgpt-export quantize --artifact ART --method dynamic|static|... --data DATA --out ART8
    jaxgpt-export quantize --artifact ART --method auto --max-loss 0.002 --data DATA --out ART8

See methods.py for what each method does, choosing.py for auto.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import Dataset, open_dataset, windows
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, sha256_of
from rich.table import Table

from jaxgpt_export.format.artifact import Artifact, read_artifact, write_artifact
from jaxgpt_export.format.certificate import altered_files, read_certificate, versions, write_certificate
from jaxgpt_export.format.probe import Probe, read_probe, write_probe
from jaxgpt_export.model.gpt import GPT, layer_shapes
from jaxgpt_export.model.int8_kernels import exact_kernels
from jaxgpt_export.parity.probe_gates import measure
from jaxgpt_export.parity.quality import Quality, batches, measure_quality
from jaxgpt_export.quantize.auto import choose, kept_layers, speed_against_float
from jaxgpt_export.quantize.quantizer import Quantizer, Rounding
from jaxgpt_export.quantize.sensitivity import sensitivity, worst_layers

QUALITY_TOKENS = 16_384  # of the validation split, for the certificate
SLOWER = 0.95  # times float's speed; short trials on shared machines do not tell less apart


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Make a quantized artifact from a float32 one.

    Attributes:
      artifact: the float32 artifact.
      method: dynamic (8 bits, a step a token, at run time), static (8 bits, a calibrated step a layer),
        static-qat (8 bits, steps from `jaxgpt train --qat`), weight-only-int8, weight-only-int4 (by GPTQ),
        weight-only-int4-head (the head too), or auto (the cheapest within --max-loss).
      out: the quantized artifact folder to write.
      data: dataset folder: its training split calibrates, its validation split measures the cost in loss.
        Only static-qat, and dynamic and weight-only-int8, which are then neither smoothed nor compensated, do
        without.
      max_loss: for auto: how much the validation loss may rise, nats.
      observer: take this candidate instead of the one nearest to float: plain or smoothed (dynamic), min-max,
        clipped or clipped-smoothed (static), gptq or nearest (4 bits), nearest (weight-only-int8).
      keep: so many of the layers that cost most stay in higher precision (8 bits instead of 4, float32 else);
        weight-only-int4-head keeps others than the head.
      sensitivity: also measure what each layer costs when it alone is rounded.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    method: Literal[
        "dynamic",
        "static",
        "static-qat",
        "weight-only-int8",
        "weight-only-int4",
        "weight-only-int4-head",
        "auto",
    ]
    out: Path
    data: Path | None = None
    max_loss: float = 0.002
    observer: str | None = None
    keep: int = 0
    sensitivity: bool = False
    overwrite: bool = False
    json: bool = False


def quantize(options: QuantizeOptions) -> Result:
    """Run `jaxgpt-export quantize`; exit code 1, and no artifact, when auto finds none within its bound."""
    inputs = [options.artifact, *([options.data] if options.data else [])]
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    if options.keep < 0:
        raise UserError(f"--keep ({options.keep}) must be 0 or more")
    if not 0 <= options.max_loss < math.inf:
        raise UserError(f"--max-loss ({options.max_loss}) must be a finite number, 0 or more")
    if options.sensitivity and options.data is None:
        raise UserError("--sensitivity measures on text: give --data, the data set of the run")
    artifact, parent = _open_parent(options.artifact)
    tokenizer = artifact.tokenizer()
    probe = read_probe(artifact)
    dataset = None if options.data is None else open_dataset(options.data)
    if dataset is not None and dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{options.data} was made with another tokenizer ({dataset.tokenizer_sha256[:12]}...) than the "
            f"artifact's ({tokenizer.sha256[:12]}...); give the data set that the model was trained on"
        )
    quantizer = Quantizer(artifact, dataset)
    if options.keep >= len(layer_shapes(artifact.config)):
        raise UserError(
            f"--keep {options.keep} would leave nothing to round, the model has "
            f"{len(layer_shapes(artifact.config))} layers"
        )
    made, figures = _round(options, quantizer, dataset)
    if made is None:
        return Result(figures, passed=False)
    method, model = made.quantization.method, made.model(artifact.config)
    against = parent["parity"].get("against", "Flax fp32")
    if method == "static-qat":  # what the training computed, rounded as this artifact rounds
        against = "Flax, rounded"
        if len(artifact.trained["logits"]) != len(probe.positions):
            raise UserError(
                f"{options.artifact}: qat.safetensors does not fit the probe; convert the run again"
            )
        probe = Probe(probe.tokens, probe.positions, artifact.trained["logits"])
    certified: dict[str, Any] = {"method": method, "exact_kernels": list(exact_kernels()), **made.figures}
    certified["parity"] = {**dataclasses.asdict(measure(model, probe)), "against": against}
    if dataset is not None:
        certified["quality"] = _quality_figures(_quality(quantizer.reference, model, dataset))
    if options.sensitivity:
        figures["sensitivity"] = sensitivity(quantizer, made)
        stderr.print(sensitivity_table(figures["sensitivity"]))
    origin = {
        **parent["origin"],
        "parent": str(options.artifact),
        "parent_sha256": sha256_of(options.artifact / "model.safetensors"),
        "quantized_with": versions("torch", "safetensors"),
    }
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        write_artifact(folder, artifact.config, made.quantization, made.tensors, tokenizer)
        write_probe(folder, probe)
        certificate = write_certificate(folder, made.quantization.kind, origin, certified)
        size = (folder / "model.safetensors").stat().st_size
    figures["kept"] = kept_layers(artifact.config, made)
    figures["speed_against_float"] = _speed(quantizer, model)
    _report(options, artifact, size, certificate)
    return Result({"size_mb": size / 1e6, **figures, **certificate})


def _open_parent(folder: Path) -> tuple[Artifact, dict[str, Any]]:
    artifact = read_artifact(folder)
    if artifact.quantization is not None:
        raise UserError(f"{folder} is {artifact.kind}; quantize takes the float32 artifact")
    parent = read_certificate(folder)
    if altered := altered_files(folder, parent):
        raise UserError(
            f"{folder} is not what its certificate was made for: {', '.join(altered)} changed; "
            "convert the run again"
        )
    return artifact, parent


def _round(
    options: QuantizeOptions, quantizer: Quantizer, dataset: Dataset | None
) -> tuple[Rounding | None, dict[str, Any]]:
    """Round by the method asked for; None, with the table, when auto finds nothing."""
    if options.observer is not None:
        if options.keep:
            raise UserError("--observer and --keep do not go together; leave one out")
        return quantizer.observed(options.method, options.observer), {}
    if options.method != "auto":
        made = quantizer.round(options.method)
        if options.keep:
            worst = worst_layers(quantizer, made, options.keep)
            say(f"kept in higher precision: {', '.join(worst)}")
            made = quantizer.round(options.method, worst)
        return made, {}
    if dataset is None:
        raise UserError("auto measures what each method costs: give --data, the data set of the run")
    if options.keep:
        raise UserError(
            "--keep goes with a method; auto keeps layers by itself where no method is good enough"
        )
    found, rows = choose(
        quantizer, lambda model: _quality(quantizer.reference, model, dataset), options.max_loss
    )
    stderr.print(choice_table(rows))
    if found is None:
        say(f"FAIL  no method stays within {options.max_loss} nats of float; no artifact was written")
    return found, {"max_loss": options.max_loss, "tried": rows}


def _speed(quantizer: Quantizer, model: GPT) -> float:
    speed = speed_against_float(quantizer.reference, model)
    if speed < SLOWER:
        say(
            f"its PyTorch module is slower than float on this machine: {speed:.2f} times its tokens/s, "
            "one text at a time; `jaxgpt-export generate` takes the native engine where it was built"
        )
    return speed


def _report(options: QuantizeOptions, artifact: Artifact, size: int, certificate: dict[str, Any]) -> None:
    parity = certificate["parity"]
    cost = ""
    if "quality" in certificate:
        cost = f"validation loss {certificate['quality']['loss_increase']:+.5f} nats, "
    say(
        f"{options.out}: {certificate['kind']}, {artifact.file_bytes / 1e6:.2f} -> {size / 1e6:.2f} MB; "
        f"{cost}"
        f"KL from {parity['against']} {parity['kl_mean']:.2e} mean, {parity['kl_max']:.2e} max, "
        f"top-1 agreement {parity['top1_agreement']:.4f}"
    )


def _quality(reference: GPT, model: GPT, dataset: Dataset) -> tuple[Quality, Quality]:
    """Measure the float and the quantized model on the first tokens of the validation split."""
    T = reference.config.block_size
    inputs, targets = windows(dataset.val, T)
    rows = max(QUALITY_TOKENS // T, 1)
    parts = batches(inputs[:rows], targets[:rows], rows=4)
    quality = measure_quality({"float": reference, "quantized": model}, parts)
    return quality["float"], quality["quantized"]


def _quality_figures(measured: tuple[Quality, Quality]) -> dict[str, Any]:
    before, after = measured
    assert after.parity is not None
    return {
        "tokens": after.tokens,
        "float_loss": before.loss,
        "quantized_loss": after.loss,
        "loss_increase": after.loss - before.loss,
        "against_float": dataclasses.asdict(after.parity),
    }


def choice_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out what auto tried."""
    table = Table("method", "in higher precision", "val loss", "KL mean", "top-1", "MB", "speed / float")
    for row in rows:
        table.add_row(
            row["method"],
            ", ".join(row["kept"]) or "-",
            f"{row['loss_increase']:+.5f}",
            f"{row['kl_mean']:.1e}",
            f"{row['top1_agreement']:.2%}",
            f"{row['size_mb']:.2f}",
            f"{row['speed_against_float']:.2f}"
            + (" (slower)" if row["speed_against_float"] < SLOWER else ""),
        )
    return table


def sensitivity_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out what each layer costs alone."""
    table = Table(
        "layer", "bits", "loss", "KL mean", "KL max", title="each rounded alone, the costliest first"
    )
    for row in rows:
        table.add_row(
            row["layer"],
            str(row["bits"]),
            f"{row['loss_increase']:+.5f}",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_max']:.1e}",
        )
    return table
