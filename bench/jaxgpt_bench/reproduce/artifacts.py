"""The artifacts of a reproduction: converted and quantized where there is none that fits.

An artifact fits where its certificate names what it would be made of and every file has its hash; a converted
one also has to hold the run's weights, bit for bit. What is made of an artifact, or measured on it, knows it
by the hash of its weights.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxgpt_export.convert import ConvertOptions, convert, sampling_of
from jaxgpt_export.format.artifact import INPUT_SCALE_SUFFIX
from jaxgpt_export.format.certificate import TRAINED_FILE, altered_files, read_certificate
from jaxgpt_export.format.generation_config import read_generation_config
from jaxgpt_export.verify import VerifyOptions, verify

from jaxgpt.shared.console import say
from jaxgpt.shared.dataset import Dataset
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of
from jaxgpt.shared.tensor_file import read_tensor_file
from jaxgpt_bench.reproduce.stages import Stages, require
from jaxgpt_bench.reproduce.training_run import best_step


def weights_sha256(artifact: Path) -> str:
    """Return the hash of an artifact's weights from its certificate, with which its files were compared."""
    return str(read_certificate(artifact)["files"]["model.safetensors"])


def converted(stages: Stages, out: Path, run: Path, dataset: Dataset, sampling: Mapping[str, Any]) -> Path:
    """Return the float32 artifact of a run, converted where there is none that fits.

    A run that was trained again with the same settings has the same configuration and other weights, so those
    are compared.

    Args:
      stages: where it is noted.
      out: the artifact folder.
      run: its best checkpoint is converted.
      dataset: of the run.
      sampling: options of `jaxgpt-export convert`: how the model's tokens are drawn.

    Raises:
      StoppedError: it is too far from the run.
    """
    step = best_step(run)
    expected = {
        "run_config_sha256": sha256_of(run / "config.json"),
        "step": step,
        "manifest_sha256": dataset.sha256,
    }

    options = ConvertOptions(run, out, data=dataset.folder, overwrite=True, **sampling)

    def fits(certificate: dict[str, Any]) -> bool:
        origin = certificate["origin"]
        found = {**origin, "manifest_sha256": origin.get("data", {}).get("manifest_sha256")}
        if read_generation_config(out) != sampling_of(options):
            return False
        return certificate["kind"] == "fp32" and all(found.get(key) == expected[key] for key in expected)

    def holds() -> bool:
        return holds_weights_of(out, run, step)

    if _is_kept(stages, "convert", out, fits, holds):
        return out
    with stages.doing("convert", f"{run} -> {out}"):
        require(convert(options), "convert")
        _require_verified(VerifyOptions(out, run), "convert")
    return out


def holds_weights_of(artifact: Path, run: Path, step: int) -> bool:
    """Whether a float32 artifact has the weights of a run's checkpoint, its trained input scales included."""
    from jaxgpt_export.flax_run.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(run, str(step))
    expected = {**checkpoint.tensors(), **checkpoint.input_scales()}
    found = read_tensor_file(artifact / "model.safetensors")
    if (trained := artifact / TRAINED_FILE).exists():
        found |= {
            name: scale
            for name, scale in read_tensor_file(trained).items()
            if name.endswith(INPUT_SCALE_SUFFIX)
        }
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


def quantized(stages: Stages, out: Path, method: str, parent: Path, dataset: Dataset) -> Path:
    """Return the artifact of a method, quantized where there is none that fits.

    Raises:
      StoppedError: it does not hold what its certificate says.
    """
    from jaxgpt_export.quantize.methods import find_method

    parent_sha256 = weights_sha256(parent)

    def fits(certificate: dict[str, Any]) -> bool:
        return (
            certificate.get("method") in (method, *find_method(method).aliases)
            and certificate["origin"].get("parent_sha256") == parent_sha256
            and "quality" in certificate  # it was given data
            and read_generation_config(out) == read_generation_config(parent)
            and chose_itself(certificate)
        )

    if _is_kept(stages, "quantize", out, fits):
        return out
    from jaxgpt_export.quantize.command import QuantizeOptions, quantize

    with stages.doing("quantize", f"{parent} -> {out}"):
        require(
            quantize(QuantizeOptions(parent, cast(Any, method), out, dataset.folder, overwrite=True)),
            "quantize",
        )
        _require_verified(VerifyOptions(out), "quantize")
    return out


def _require_verified(options: VerifyOptions, stage: str) -> None:
    """Remove an artifact that does not hold what its certificate says: the next call would keep it."""
    result = verify(options)
    if not result.passed:
        shutil.rmtree(options.artifact)
        say(f"[{stage}] {options.artifact} is removed")
    require(result, stage)


def chose_itself(certificate: dict[str, Any]) -> bool:
    """Whether a method took the nearest of its candidates, and not the one that --observer named."""
    calibration = certificate.get("calibration", {})
    return "observer" not in calibration or "observers" in calibration


def _is_kept(
    stages: Stages,
    name: str,
    out: Path,
    fits: Callable[[dict[str, Any]], bool],
    holds: Callable[[], bool] = lambda: True,
) -> bool:
    """Tell whether an artifact is kept.

    Args:
      stages: where it is noted.
      name: of the stage.
      out: the artifact folder.
      fits: whether its certificate is of what is asked for.
      holds: whether its files, whose hashes fit, hold what it is to be made of.
    """
    if not out.exists() or name in stages.redo:
        return False
    try:
        certificate = read_certificate(out)
        why = "is of another model or setting" if not fits(certificate) else ""
        if not why and (altered := altered_files(out, certificate)):
            why = f"was altered ({', '.join(altered)})"
        if not why and not holds():
            why = "has other weights than the run, which was trained again"
    except UserError as error:
        why = f"can't be read ({error})"
    if why:
        say(f"[{name}] {out} {why}")
        return False
    stages.kept(name, f"{out}, its certificate and hashes fit", certificate)
    return True
