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

import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import Any

from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.files import read_json, sha256_of, write_json
from jaxgpt.shared.huggingface import MODEL_TYPE, model_type_of

CERTIFICATE_FORMAT_VERSION = 1
TRAINED_FILE = "qat.safetensors"  # what a quantization-aware training leaves besides its weights
CERTIFIED_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "probe.safetensors",
)
# They decide ids too; artifacts of before have none that is certified.
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OPTIONAL_FILES = (TRAINED_FILE, "generation_config.json", *TOKEN_FILES, "chat_template.jinja")
PARITY_FIGURES = ("max_abs_logit_diff", "kl_mean", "kl_max", "top1_agreement")


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
    """Read certificate.json; UserError when it is missing, damaged or of another version."""
    require_certificate(folder)
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
        step, _ = certificate["origin"]["step"], certificate["files"].items()
        if step is not None and type(step) is not int:
            raise ValueError(f"step {quoted(step)}, expected a whole number or null")
        if not all(math.isfinite(certificate["parity"][name]) for name in PARITY_FIGURES):
            raise ValueError("figures that are not finite")
    return certificate


def require_certificate(folder: Path) -> None:
    """Raise UserError for the folder of a float32 GPT-2 without a certificate, as other programs save it."""
    config = folder / "config.json"
    if os.path.lexists(folder / "certificate.json") or not config.is_file():
        return
    if model_type_of(config, "artifact configuration") == MODEL_TYPE:
        raise UserError(
            f"{folder / 'certificate.json'} is missing: {folder} is a GPT-2 as other programs save it; bring "
            f"it in with: jaxgpt-export import-hf --source {folder} --out ARTIFACT"
        )


def altered_files(folder: Path, certificate: dict[str, Any]) -> list[str]:
    """Return the names of files that are not those that were certified."""
    files = certificate["files"]
    uncertified = (TRAINED_FILE, *(TOKEN_FILES if TOKEN_FILES[0] in files else ()))
    added = {name for name in uncertified if os.path.lexists(folder / name)}
    return [
        name
        for name in (*CERTIFIED_FILES, *OPTIONAL_FILES)
        if name in {*CERTIFIED_FILES, *files, *added}
        and (not (folder / name).is_file() or sha256_of(folder / name) != files.get(name))
    ]


def _present(folder: Path) -> list[str]:
    return [*CERTIFIED_FILES, *(name for name in OPTIONAL_FILES if (folder / name).exists())]
