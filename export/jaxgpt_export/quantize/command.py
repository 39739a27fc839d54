"""`jaxgpt-export quantize`: the float32 artifact -> a quantized artifact.

    jaxgpt-export quantize --artifact ART --method int8-dynamic|int8-static|... --data DATA --out ART8
    jaxgpt-export quantize --artifact ART --method auto --max-loss 0.002 --data DATA --out ART8

The folder methods has a file for each method; auto.py says how auto chooses.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxgpt.shared.architecture import matrices
from jaxgpt.shared.console import Result, say, stderr
from jaxgpt.shared.dataset import Dataset, open_dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import check_replaceable, new_folder, only_writer
from jaxgpt.shared.tokenizer import Tokenizer
from rich.table import Table

from jaxgpt_export.format.artifact import Artifact, read_artifact, write_artifact
from jaxgpt_export.format.certificate import altered_files, read_certificate, versions, write_certificate
from jaxgpt_export.format.model_card import write_model_card
from jaxgpt_export.format.probe import Probe, read_probe, write_probe

if TYPE_CHECKING:
    from jaxgpt_export.model.gpt import GPT
    from jaxgpt_export.parity.quality import Quality
    from jaxgpt_export.quantize.quantizer import Quantizer
    from jaxgpt_export.quantize.state_dict import QuantizedStateDict

QUALITY_TOKENS = 16_384  # of the validation split, for the certificate
MAX_LOSS = 0.002  # nats that auto may add, unless told otherwise
SLOWER = 0.95  # times float's speed; short trials on shared machines do not tell less apart


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Make a quantized artifact from a float32 one.

    Attributes:
      artifact: the float32 artifact.
      method: int8-dynamic (8 bits, a scale a token, at run time), int8-static (8 bits, a calibrated scale a
        layer), int8-static-qat (8 bits, scales from `jaxgpt train --qat`), int8-weight-only,
        int4-weight-only (by GPTQ), int4-weight-only-head (the head too), int4-dynamic and
        int4-dynamic-head (the same with 8-bit inputs), fp16 (weights in float16), or auto (the cheapest of
        integers within --max-loss).
      out: the quantized artifact folder to write.
      data: dataset folder: its training split calibrates, its validation split measures the cost in loss.
        Only fp16 and int8-static-qat, and int8-dynamic and int8-weight-only, which are then neither
        smoothed nor rounded by GPTQ, do without.
      max_loss: for auto: how much the validation loss may rise, nats; 0.002 unless given.
      observer: take this candidate instead of the one nearest to float: plain or smoothed (int8-dynamic),
        min-max, clipped or clipped-smoothed (int8-static), gptq or nearest (4 bits),
        nearest (int8-weight-only).
      high_precision_layers: so many of the layers that cost most stay in higher precision (8 bits instead
        of 4, float32 else); the methods with a head of 4 bits keep others than that.
      sensitivity: also measure what each layer costs when it alone is rounded.
      overwrite: replace an earlier artifact.
      json: print one JSON document with all figures on stdout.
    """

    RENAMED: ClassVar[dict[str, str]] = {"--keep": "--high-precision-layers"}

    artifact: Path
    method: str
    out: Path
    data: Path | None = None
    max_loss: float | None = None
    observer: str | None = None
    high_precision_layers: int = 0
    sensitivity: bool = False
    overwrite: bool = False
    json: bool = False


def quantize(options: QuantizeOptions) -> Result:
    """Run `jaxgpt-export quantize`; exit code 1, and no artifact, when auto finds none within its bound."""
    _check(options)
    with only_writer(options.out):
        return _quantize(options)


def _quantize(options: QuantizeOptions) -> Result:
    from jaxgpt_export.model.int8_kernels import exact_kernels
    from jaxgpt_export.parity.probe_gates import measure
    from jaxgpt_export.quantize.quantizer import Quantizer
    from jaxgpt_export.quantize.sensitivity import sensitivity

    artifact, parent = _open_parent(options.artifact)
    probe, tokenizer = read_probe(artifact), artifact.tokenizer()
    dataset = _open_dataset(options, artifact, tokenizer)
    quantizer = Quantizer(artifact, dataset)
    candidate, figures = _round(options, quantizer, dataset)
    if candidate is None:
        return Result(figures, passed=False)
    model = candidate.model(artifact.config)
    probe, against = _probe_of(candidate, artifact, probe, parent)
    certified: dict[str, Any] = {
        "method": candidate.quantization.method,
        "exact_kernels": list(exact_kernels()),
        **candidate.figures,
        "parity": {**dataclasses.asdict(measure(model, probe)), "against": against},
    }
    if dataset is not None:
        say(f"measuring the loss on {min(QUALITY_TOKENS, len(dataset.val)):,} validation tokens")
        certified["quality"] = _quality_figures(_quality(quantizer.reference, model, dataset))
    if options.sensitivity:
        say("measuring what each layer costs when it alone is rounded")
        figures["sensitivity"] = sensitivity(quantizer, candidate)
        stderr.print(sensitivity_table(figures["sensitivity"]))
    origin = {
        **parent["origin"],
        "parent": str(options.artifact),
        "parent_sha256": parent["files"]["model.safetensors"],  # it was held against it
        "quantized_with": versions("torch", "safetensors"),
    }
    figures |= _speed(quantizer, candidate, model)
    certificate, size = _write(options, artifact, tokenizer, candidate, probe, origin, certified)
    _report(options, artifact, size, certificate)
    return Result({"size_mb": size / 1e6, **figures, **certificate})


def _check(options: QuantizeOptions) -> None:
    """Raise UserError for options that can't be meant, before anything is read."""
    from jaxgpt_export.quantize.methods import find_method

    inputs = [options.artifact, *([options.data] if options.data else [])]
    check_replaceable(options.out, options.overwrite, "certificate.json", inputs)
    if options.method != "auto":
        find_method(options.method)
    if options.high_precision_layers < 0:
        raise UserError(f"--high-precision-layers ({options.high_precision_layers}) must be 0 or more")
    if options.max_loss is not None and not 0 <= options.max_loss < math.inf:
        raise UserError(f"--max-loss ({options.max_loss}) must be a finite number, 0 or more")
    if options.max_loss is not None and options.method != "auto":
        raise UserError(
            f"--max-loss is what --method auto chooses by, and {options.method} is made whatever it costs: "
            "leave it out, and see `jaxgpt-export compare --max-loss-increase`"
        )
    if options.high_precision_layers and options.data is None:
        raise UserError("--high-precision-layers ranks layers on text: give --data, the data set of the run")
    if options.sensitivity and options.data is None:
        raise UserError("--sensitivity measures on text: give --data, the data set of the run")


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


def _open_dataset(options: QuantizeOptions, artifact: Artifact, tokenizer: Tokenizer) -> Dataset | None:
    if options.data is None:
        return None
    dataset = open_dataset(options.data)
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{options.data} was made with another tokenizer ({dataset.tokenizer_sha256[:12]}...) than the "
            f"artifact's ({tokenizer.sha256[:12]}...); give the data set that the model was trained on"
        )
    T = artifact.config.block_size
    if len(dataset.val) <= T:
        raise UserError(
            f"{options.data}: the validation split has {len(dataset.val)} tokens, the loss is measured on "
            f"whole contexts of the model, at least {T + 1}; prepare more text, or more of it for validation "
            "(jaxgpt prepare --val-fraction)"
        )
    return dataset


def _round(
    options: QuantizeOptions, quantizer: "Quantizer", dataset: Dataset | None
) -> tuple["QuantizedStateDict | None", dict[str, Any]]:
    """Round by the method asked for; None, with the table, when auto finds nothing."""
    from jaxgpt_export.quantize.auto import high_precision_layers
    from jaxgpt_export.quantize.methods import find_method
    from jaxgpt_export.quantize.sensitivity import worst_layers

    count, layers = options.high_precision_layers, matrices(quantizer.config)
    if count >= len(layers):
        raise UserError(
            f"--high-precision-layers {count} would leave nothing to round, "
            f"the model has {len(layers)} layers"
        )
    if options.method == "auto" and options.observer is None:
        return _choose(options, quantizer, dataset)
    if options.method == "auto":
        raise UserError("--observer goes with a method by name, and --method is auto; leave one out")
    method = find_method(options.method)
    if options.observer is not None:
        if count:
            raise UserError("--observer and --high-precision-layers do not go together; leave one out")
        candidate = method.apply_observer(quantizer, options.observer)
    else:
        candidate = method.apply(quantizer)
        if count:
            worst = worst_layers(quantizer, method, candidate, count)
            say(f"kept in higher precision: {', '.join(worst)}")
            candidate = method.apply(quantizer, worst)
    return candidate, {"kept": high_precision_layers(quantizer.config, method, candidate)}


def _choose(
    options: QuantizeOptions, quantizer: "Quantizer", dataset: Dataset | None
) -> tuple["QuantizedStateDict | None", dict[str, Any]]:
    """Take the cheapest method within the bound."""
    from jaxgpt_export.quantize.auto import choose

    if dataset is None:
        raise UserError("auto measures what each method costs: give --data, the data set of the run")
    if options.high_precision_layers:
        raise UserError(
            "--high-precision-layers goes with a method; auto keeps layers by itself where no method is good "
            "enough"
        )
    bound = MAX_LOSS if options.max_loss is None else options.max_loss
    found, rows = choose(quantizer, lambda model: _quality(quantizer.reference, model, dataset), bound)
    stderr.print(choice_table(rows))
    figures: dict[str, Any] = {"max_loss": bound, "tried": rows}
    if found is None:
        say(f"FAIL  no method stays within {bound} nats of float; no artifact was written")
    else:
        figures["kept"] = rows[-1]["kept"]
    return found, figures


def _probe_of(
    candidate: "QuantizedStateDict", artifact: Artifact, probe: Probe, parent: dict[str, Any]
) -> tuple[Probe, str]:
    """Return the logits that the artifact is held against, and whose they are."""
    from jaxgpt_export.parity.probe_gates import AGAINST_ROUNDED

    if not candidate.trained:
        return probe, parent["parity"].get("against", "Flax fp32")
    # What the training computed, rounded as this artifact rounds.
    if len(artifact.trained["logits"]) != len(probe.positions):
        raise UserError(f"{artifact.folder}: qat.safetensors does not fit the probe; convert the run again")
    return Probe(probe.tokens, probe.positions, artifact.trained["logits"]), AGAINST_ROUNDED


def _write(
    options: QuantizeOptions,
    artifact: Artifact,
    tokenizer: Tokenizer,
    candidate: "QuantizedStateDict",
    probe: Probe,
    origin: dict[str, Any],
    certified: dict[str, Any],
) -> tuple[dict[str, Any], int]:
    """Write the artifact; return its certificate and the bytes of its weights."""
    from jaxgpt_export.model.build import as_arrays

    quantization = candidate.quantization
    with new_folder(options.out, options.overwrite, "certificate.json") as folder:
        tensors = as_arrays(candidate.tensors)
        write_artifact(folder, artifact.config, quantization, tensors, tokenizer, artifact.generation)
        write_probe(folder, probe)
        certificate = write_certificate(folder, quantization.method, origin, certified)
        write_model_card(folder, artifact.config, certificate)
        size = (folder / "model.safetensors").stat().st_size
    return certificate, size


def _speed(quantizer: "Quantizer", candidate: "QuantizedStateDict", model: "GPT") -> dict[str, Any]:
    """Return how fast the artifact is beside float, if that can be measured; say it where it is slower."""
    from jaxgpt_export.quantize.speed import speed_figures, try_speed

    speed = try_speed(quantizer, candidate, model)
    if speed is not None and speed.against_float < SLOWER:
        where = f"the PyTorch module, which runs because the native engine does not: {speed.reason}"
        say(
            f"it is slower than float on this machine: {speed.against_float:.2f} times its tokens/s, one "
            f"text at a time, in {'the native engine' if speed.reason is None else where}"
        )
    return speed_figures(speed)


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


def _quality(reference: "GPT", model: "GPT", dataset: Dataset) -> tuple["Quality", "Quality"]:
    """Measure the float and the quantized model on the first tokens of the validation split."""
    from jaxgpt_export.parity.quality import batches, measure_quality

    T = reference.config.block_size
    inputs, targets = dataset.val_windows(T, 0, max(QUALITY_TOKENS // T, 1))
    parts = batches(inputs, targets, rows=4)
    quality = measure_quality({"float": reference, "quantized": model}, parts)
    return quality["float"], quality["quantized"]


def _quality_figures(measured: "tuple[Quality, Quality]") -> dict[str, Any]:
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
            f"{row['speed_against_float']:.2f} x" if "speed_against_float" in row else "-",
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
