"""`jaxgpt-export verify`: an artifact's certificate, measured anew.

jaxgpt-export verify --artifact ART [--run RUN]
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError

from jaxgpt_export.format.certificate import altered_files, read_certificate

if TYPE_CHECKING:
    from jaxgpt_export.format.artifact import Artifact
    from jaxgpt_export.format.probe import Probe


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
    from jaxgpt_export.format.artifact import read_artifact
    from jaxgpt_export.format.probe import read_probe
    from jaxgpt_export.model.build import build_model
    from jaxgpt_export.model.int8_kernels import exact_kernels
    from jaxgpt_export.parity.probe_gates import fp32_bound, measure, parity_gates

    artifact = read_artifact(options.artifact)
    certificate = read_certificate(options.artifact)
    probe = read_probe(artifact)
    altered = altered_files(options.artifact, certificate)
    parity = measure(build_model(artifact), probe)
    gates = {
        "files are the certified ones": not altered,
        f"kind is {certificate['kind']}": certificate["kind"] == artifact.kind,
        **parity_gates(artifact, parity, certificate, fp32_bound(probe)),
    }
    figures: dict[str, Any] = {
        "kind": artifact.kind,
        "altered_files": altered,
        "parity": dataclasses.asdict(parity),
    }
    if artifact.quantization is not None:
        figures["exact_kernels"] = list(exact_kernels())
    if options.run is not None:
        difference, gate = _against_run(options.run, artifact, certificate, probe)
        figures["flax_max_abs_logit_diff"] = difference
        gates |= gate
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    if altered:
        say(f"      altered: {', '.join(altered)}")
    figures["gates"] = gates
    figures["passed"] = all(gates.values())
    return Result(figures, passed=figures["passed"])


def _against_run(
    run: Path, artifact: "Artifact", certificate: dict[str, Any], probe: "Probe"
) -> tuple[float, dict[str, bool]]:
    """Compute the probe's logits from the run anew; return the largest difference and its gate.

    Raises:
      UserError: the artifact does not come from that run.
    """
    from jaxgpt_export.flax_run.checkpoint import config_hashes, read_checkpoint
    from jaxgpt_export.parity.probe_gates import AGAINST_ROUNDED, fp32_bound

    origin = certificate["origin"]
    if origin["step"] is None:
        raise UserError(
            f"{artifact.folder} was imported from {origin.get('source')}, "
            "no run made it; verify it without --run"
        )
    if (run / "config.json").exists() and origin.get("run_config_sha256") not in config_hashes(run):
        raise UserError(
            f"{artifact.folder} does not come from {run} but from "
            f"{origin.get('run')} (another configuration); give that run"
        )
    rounded = certificate["parity"].get("against") == AGAINST_ROUNDED
    checkpoint = read_checkpoint(run, str(int(origin["step"])))
    logits = checkpoint.logits(probe.tokens, rounded)[probe.positions]
    difference = float(abs(logits - probe.logits).max())
    bound = fp32_bound(probe)
    text = f"Flax logits of the run, max abs difference {difference:.2e} <= {bound:.1e}"
    return difference, {text: difference <= bound}
