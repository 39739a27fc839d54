"""What ONNX Runtime computes of a written folder, held to the artifact's probe.

float32: no logit is further from the probe's than `verify` lets the artifact's own be.

Quantized: two distances, each in lengths of the logits (without their mean, which changes no probability).
From the probe: what weights and inputs cost together. From the PyTorch module with the float32 weights that
the integers stand for: the rounding of inputs alone, inside the operators. The second is small whatever the
first is, so that a matrix in a wrong order is not taken for the cost of 4 bits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Float
from torch import Tensor

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.probe import Probe
from jaxgpt_export.interchange.onnx.precision import Precision
from jaxgpt_export.interchange.onnx.rounding import rounded_model
from jaxgpt_export.interchange.onnx.session import OnnxSession
from jaxgpt_export.model.build import as_tensors, float_model
from jaxgpt_export.parity.metrics import compare
from jaxgpt_export.parity.probe_gates import fp32_bound, probe_logits

# Inputs in 8 bits gave 0.016 to 0.020, on a trained model and on GPT-2's shape with random weights. One
# matrix of 24 with its rows or halves of bytes out of order gave 0.29 to 1.2. int8-dynamic has one scale for
# all tokens and channels, and models with outliers among these pay more.
MAX_FROM_MODULE: dict[Precision, float] = {
    "int8-dynamic": 0.2,
    "int8-weight-only": 0.1,
    "int4-weight-only": 0.1,
}
# The same models: 0.020 and 0.033, 0.021 and 0.027, 0.15 and 0.33.
MAX_FROM_PROBE: dict[Precision, float] = {
    "int8-dynamic": 0.3,
    "int8-weight-only": 0.2,
    "int4-weight-only": 0.6,
}


def session_logits(session: OnnxSession, probe: Probe) -> Float[Tensor, "P1 V"]:
    """Return the logits at a probe's positions, and those of the last one again, its text taken at once.

    Each text is taken in pieces between the positions, the last token of a piece alone: prompts, prompts that
    go on and single tokens all take part.
    """
    T, positions = probe.tokens.shape[1], probe.positions
    rows: list[Any] = []
    for index, tokens in enumerate(probe.tokens.tolist()):
        done = 0
        for at in (positions[positions // T == index] % T).tolist():
            session.truncate(min(done, at))
            if done < at:
                session.extend(tokens[done:at])
            rows.append(session.decode(tokens[at]).copy())
            done = at + 1
    index, at = divmod(int(positions[-1]), T)
    rows.append(session.prefill(probe.tokens[index, : at + 1].tolist()).copy())
    return torch.from_numpy(np.stack(rows))


def relative_error(reference: Float[Tensor, "P V"], other: Float[Tensor, "P V"]) -> float:
    """Return the length of the difference, in lengths of the reference; both without their mean."""
    a, b = (logits.double() - logits.double().mean(dim=1, keepdim=True) for logits in (reference, other))
    return float((a - b).norm() / a.norm())


def module_logits(artifact: Artifact, precision: Precision, probe: Probe) -> Float[Tensor, "P V"]:
    """Return the logits of the module with the weights that a graph's integers stand for."""
    config, tensors = rounded_model(artifact.tensors, artifact.config, precision)
    return probe_logits(float_model(config, as_tensors(tensors)), probe)


def check_folder(
    folder: Path, artifact: Artifact, precision: Precision, probe: Probe
) -> tuple[dict[str, float], dict[str, bool]]:
    """Run a folder's model in ONNX Runtime.

    Args:
      folder: with model.onnx.
      artifact: that it was made from.
      precision: of the model.
      probe: of the artifact.

    Returns:
      What was measured, and the gates on it, each with its figures as text.

    Raises:
      UserError: logits hold NaN or infinity, or ONNX Runtime can't run the model.
    """
    found = session_logits(_open(folder), probe)
    reference = _last_again(torch.from_numpy(probe.logits))
    parity = compare(reference, found)
    figures = {
        "max_abs_logit_diff": parity.max_abs_logit_diff,
        "kl_mean": parity.kl_mean,
        "kl_max": parity.kl_max,
        "top1_agreement": parity.top1_agreement,
    }
    if precision == "float32":
        bound = fp32_bound(probe)
        text = f"logits differ from the probe's by at most {parity.max_abs_logit_diff:.2e} <= {bound:.1e}"
        return figures, {text: parity.max_abs_logit_diff <= bound}
    of_module = _last_again(module_logits(artifact, precision, probe))
    gates = {}
    for name, logits, bound in (
        ("probe", reference, MAX_FROM_PROBE[precision]),
        ("module_with_these_weights", of_module, MAX_FROM_MODULE[precision]),
    ):
        error = figures[f"error_from_{name}"] = relative_error(logits, found)
        gates[f"relative error from the {name.replace('_', ' ')} {error:.4f} <= {bound}"] = error <= bound
    return figures, gates


def _open(folder: Path) -> OnnxSession:
    import onnxruntime

    try:
        return OnnxSession(folder)
    except Exception as error:  # its classes are those of pybind11, one for each of its codes
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} can't run the model ({line}); install 1.23 or newer"
        ) from None


def _last_again(logits: Float[Tensor, "P V"]) -> Float[Tensor, "P1 V"]:
    return torch.cat([logits, logits[-1:]])
