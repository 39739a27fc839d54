"""What an artifact carries as evidence, and `jaxgpt-export verify`, which measures it anew.

    jaxgpt-export verify --artifact ART [--run RUN]

certificate.json says which run and step the artifact came from, with which versions, the hash of every
file, and the measured distance of the module's logits from the logits that Flax gave for the run.
probe.safetensors holds those Flax logits, so that `verify` needs no JAX:

    tokens      (B, T) int32     text of the run's validation split
    positions   (P,) int32       flat positions b T + t whose logits are kept
    logits      (P, V) float32   Flax, float32, of the run's checkpoint

An imported model has no run: its origin names the source, its logits come from `parity.against`.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxgpt.config import ModelConfig
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.files import read_json, sha256_of, write_json
from jaxgpt.tokens import windows
from jaxtyping import Float, Int32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.artifact import TRAINED_FILE, Artifact, read_artifact
from export.layers import exact_kernels
from export.model import GPT
from export.parity import Parity, compare

CERTIFICATE_FORMAT_VERSION = 1
CERTIFIED_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "probe.safetensors",
)
OPTIONAL_FILES = (TRAINED_FILE, "generation_config.json")
PARITY_FIGURES = ("max_abs_logit_diff", "kl_mean", "kl_max", "top1_agreement")
PROBE_SEQUENCES = 4
MAX_PROBE_BYTES = 8_000_000  # a GPT-2 vocabulary takes 0.2 MB a position
# float32 on both sides, matrix products summed in different orders: measured 3e-6 to 2e-5 on logits of
# size 10; 1e-4 leaves room for another BLAS and none for a wrong epsilon, GELU or transposition.
MAX_FP32_LOGIT_DIFF = 1e-4
FP32_LOGIT_SIZE = 10.0  # float32 errors grow with the logits: beyond this size the bound does too
# INT8 against what was certified: another CPU may round float sums differently, which moves single
# integers by one step; KL then moves by a few per cent, a wrong scale or layer by orders of magnitude.
INT8_KL_FACTOR = 1.5
INT8_KL_SLACK = 1e-5
INT8_TOP1_SLACK = 0.01


@dataclasses.dataclass(frozen=True)
class Probe:
    """Tokens with the logits that Flax gave for them; shapes in the module's docstring."""

    tokens: Int32[Tensor, "B T"]
    positions: Int32[Tensor, "P"]
    logits: Float[Tensor, "P V"]


def probe_tokens(val: "np.ndarray[Any, np.dtype[np.uint16]]", block_size: int) -> Int32[Tensor, "B T"]:
    """Choose windows of the validation split, evenly spread; at most 4."""
    inputs, targets = windows(val, block_size)
    full = inputs[(targets >= 0).all(axis=1)]
    chosen = np.linspace(0, len(full) - 1, min(PROBE_SEQUENCES, len(full))).round().astype(int)
    return torch.from_numpy(full[chosen])


def probe_positions(tokens: int, vocab_size: int) -> Int32[Tensor, "P"]:
    """Choose flat positions, evenly spread with first and last, whose logits fit into 8 MB."""
    count = max(min(tokens, MAX_PROBE_BYTES // (4 * vocab_size)), 2)
    return torch.linspace(0, tokens - 1, count).round().to(torch.int32)


def fp32_bound(probe: Probe) -> float:
    """Return how far float32 logits may be from those of a probe."""
    return MAX_FP32_LOGIT_DIFF * max(1.0, float(probe.logits.abs().max()) / FP32_LOGIT_SIZE)


def write_probe(folder: Path, probe: Probe) -> None:
    """Write probe.safetensors."""
    fields = {name: getattr(probe, name).contiguous() for name in ("tokens", "positions", "logits")}
    save_file(fields, folder / "probe.safetensors")


def read_probe(artifact: Artifact) -> Probe:
    """Read probe.safetensors; UserError when it is missing, damaged or of another model."""
    path = artifact.folder / "probe.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; convert the run again")
    try:
        fields = load_file(path)
        probe = Probe(fields["tokens"], fields["positions"], fields["logits"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); convert the run again") from None
    _check_probe(probe, artifact.config, path)
    return probe


def _check_probe(probe: Probe, config: ModelConfig, path: Path) -> None:
    """Raise UserError unless a probe's shapes and values are those of a model."""
    tokens, positions, logits = probe.tokens, probe.positions, probe.logits
    if tokens.ndim != 2 or positions.ndim != 1 or logits.shape != (len(positions), config.vocab_size):
        raise UserError(f"{path} belongs to another model; convert the run again")
    if (tokens.dtype, positions.dtype, logits.dtype) != (torch.int32, torch.int32, torch.float32):
        raise UserError(f"{path} is damaged: its tensors are of other types; convert the run again")
    fits = (
        tokens.shape[1] <= config.block_size
        and tokens.numel()
        and len(positions)
        and 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size
        and 0 <= int(positions.min()) <= int(positions.max()) < tokens.numel()
        and bool((positions.diff() >= 0).all())
        and bool(torch.isfinite(logits).all())
    )
    if not fits:
        raise UserError(f"{path} is damaged or belongs to another model; convert the run again")


@torch.inference_mode()
def probe_logits(model: GPT, probe: Probe) -> Float[Tensor, "P V"]:
    """Return a module's logits at the probe's positions."""
    T = probe.tokens.shape[1]
    rows = []
    for index, tokens in enumerate(probe.tokens):
        here = (probe.positions // T == index).nonzero().flatten()
        rows.append(model(tokens[None].long())[0, probe.positions[here] % T])
    return torch.cat(rows)


def measure(model: GPT, probe: Probe) -> Parity:
    """Compare a module with the Flax logits of the probe."""
    return compare(probe.logits, probe_logits(model, probe))


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, Python and the machine's architecture."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def write_certificate(
    folder: Path, kind: str, origin: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """Write certificate.json for what lies in a folder.

    Args:
      folder: of the artifact, every other file in place.
      kind: fp32, int8-dynamic, int4-weight-only, ...
      origin: run, step and versions of the run that it came from.
      figures: what was measured.

    Returns:
      The certificate.
    """
    certificate = {
        "format_version": CERTIFICATE_FORMAT_VERSION,
        "kind": kind,
        "origin": origin,
        **figures,
        "files": {name: sha256_of(folder / name) for name in _present(folder)},
    }
    write_json(folder / "certificate.json", certificate)
    return certificate


def read_certificate(folder: Path) -> dict[str, Any]:
    """Read certificate.json; UserError when it is missing or of another version."""
    certificate = read_json(folder / "certificate.json", "certificate")
    if certificate.get("format_version") != CERTIFICATE_FORMAT_VERSION:
        raise UserError(
            f"{folder / 'certificate.json'} has format version {quoted(certificate.get('format_version'))}, "
            f"expected {CERTIFICATE_FORMAT_VERSION}; convert the run again"
        )
    missing = [key for key in ("kind", "origin", "parity", "files") if key not in certificate]
    if missing:
        raise UserError(f"{folder / 'certificate.json'} lacks {', '.join(missing)}; convert the run again")
    with damaged(folder / "certificate.json", "convert the run again"):
        certificate["origin"]["step"], certificate["files"].items()
        if not all(math.isfinite(certificate["parity"][name]) for name in PARITY_FIGURES):
            raise ValueError("figures that are not finite")
    return certificate


def altered_files(folder: Path, certificate: dict[str, Any]) -> list[str]:
    """Return the names of files that are not those that were certified."""
    files = certificate["files"]
    added = {TRAINED_FILE} if os.path.lexists(folder / TRAINED_FILE) else set()
    return [
        name
        for name in (*CERTIFIED_FILES, *OPTIONAL_FILES)
        if name in {*CERTIFIED_FILES, *files, *added}
        and (not (folder / name).is_file() or sha256_of(folder / name) != files.get(name))
    ]


def _present(folder: Path) -> list[str]:
    return [*CERTIFIED_FILES, *(name for name in OPTIONAL_FILES if (folder / name).exists())]


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Measure an artifact's certificate anew; exit code 1 when a gate fails.

    Attributes:
      artifact: the artifact folder.
      run: the run it came from: its Flax logits are recomputed too (needs JAX).
      json: print one JSON document with all figures on stdout.
    """

    artifact: Path
    run: Path | None = None
    json: bool = False


def verify(options: VerifyOptions) -> Result:
    """Run `jaxgpt-export verify`."""
    artifact = read_artifact(options.artifact)
    certificate = read_certificate(options.artifact)
    probe = read_probe(artifact)
    gates: dict[str, bool] = {}
    altered = altered_files(options.artifact, certificate)
    gates["files are the certified ones"] = not altered
    gates[f"kind is {certificate['kind']}"] = certificate["kind"] == artifact.kind
    parity = measure(artifact.model(), probe)
    gates |= parity_gates(artifact, parity, certificate, fp32_bound(probe))
    figures: dict[str, Any] = {
        "kind": artifact.kind,
        "altered_files": altered,
        "parity": dataclasses.asdict(parity),
    }
    if artifact.quantization is not None:
        figures["exact_kernels"] = list(exact_kernels())
    if options.run is not None:
        if certificate["origin"]["step"] is None:
            raise UserError(
                f"{options.artifact} was imported from {certificate['origin'].get('source')}, "
                "no run made it; verify it without --run"
            )
        from export.convert import flax_logits  # the only module that knows JAX

        config = options.run / "config.json"
        if config.exists() and sha256_of(config) != certificate["origin"].get("run_config_sha256"):
            raise UserError(
                f"{options.artifact} does not come from {options.run} but from "
                f"{certificate['origin'].get('run')} (another configuration); give that run"
            )
        step, rounded = int(certificate["origin"]["step"]), artifact.kind == "int8-static-qat"
        logits = flax_logits(options.run, step, probe, rounded)
        difference = float((logits - probe.logits).abs().max())
        figures["flax_max_abs_logit_diff"] = difference
        text = f"Flax logits of the run, max abs difference {difference:.2e} <= {MAX_FP32_LOGIT_DIFF:.0e}"
        gates[text] = difference <= MAX_FP32_LOGIT_DIFF
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    if altered:
        say(f"      altered: {', '.join(altered)}")
    figures["gates"] = gates
    figures["passed"] = all(gates.values())
    return Result(figures, passed=figures["passed"])


def parity_gates(
    artifact: Artifact, parity: Parity, certificate: dict[str, Any], bound: float
) -> dict[str, bool]:
    """Return the gates on the distance from the probe's logits, each with its figures as text.

    Args:
      artifact: what was measured.
      parity: its distance.
      certificate: of the artifact.
      bound: on a logit's difference, for float32.
    """
    certified = certificate["parity"]
    against = certified.get("against", "Flax fp32")
    if artifact.quantization is None:
        largest = parity.max_abs_logit_diff
        text = f"logits against {against}: max abs difference {largest:.2e} <= {bound:.1e}"
        return {text: largest <= bound}
    kl_bound = {
        name: INT8_KL_FACTOR * float(certified[name]) + INT8_KL_SLACK for name in ("kl_mean", "kl_max")
    }
    top1_bound = float(certified["top1_agreement"]) - INT8_TOP1_SLACK
    mean_text = f"KL from {against}: mean {parity.kl_mean:.2e} <= {kl_bound['kl_mean']:.2e}"
    max_text = f"KL from {against}: max {parity.kl_max:.2e} <= {kl_bound['kl_max']:.2e}"
    top1_text = f"top-1 agreement with {against} {parity.top1_agreement:.4f} >= {top1_bound:.4f}"
    # A certificate that claims more error than there is was not made for these files either.
    claimed = INT8_KL_FACTOR * parity.kl_mean + INT8_KL_SLACK
    claim_text = (
        f"certified KL mean {float(certified['kl_mean']):.2e} <= {claimed:.2e}, from what is measured"
    )
    top1_claim = parity.top1_agreement - INT8_TOP1_SLACK
    return {
        claim_text: float(certified["kl_mean"]) <= claimed
        and float(certified["top1_agreement"]) >= top1_claim,
        mean_text: parity.kl_mean <= kl_bound["kl_mean"],
        max_text: parity.kl_max <= kl_bound["kl_max"],
        top1_text: parity.top1_agreement >= top1_bound,
    }
