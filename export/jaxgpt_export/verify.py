"""`jaxgpt-export verify`: an artifact's certificate, measured anew.

jaxgpt-export verify --artifact ART [--run RUN]
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of

from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import altered_files, read_certificate
from jaxgpt_export.format.probe import read_probe
from jaxgpt_export.model.int8_kernels import exact_kernels
from jaxgpt_export.parity.probe_gates import MAX_FP32_LOGIT_DIFF, fp32_bound, measure, parity_gates


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
        from jaxgpt_export.flax_run.logits import flax_logits  # the only module that knows JAX

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
