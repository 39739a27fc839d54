"""How far a module is from the logits of its probe, and the gates on that distance."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.format.probe import Probe
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.parity.metrics import Parity, ParityMeter, compare

# float32 on both sides, matrix products summed in different orders: measured 3e-6 to 2e-5 on logits of
# size 10; 1e-4 leaves room for another BLAS and none for a wrong epsilon, GELU or transposition.
MAX_FP32_LOGIT_DIFF = 1e-4
FP32_LOGIT_SIZE = 10.0  # float32 errors grow with the logits: beyond this size the bound does too
# INT8 against what was certified: another CPU may round float sums differently, which moves single
# integers by one; KL then moves by a few per cent, a wrong scale or layer by orders of magnitude.
INT8_KL_FACTOR = 1.5
INT8_KL_SLACK = 1e-5
INT8_TOP1_SLACK = 0.01
AGAINST_ROUNDED = "Flax, rounded"  # the probe holds what a quantization-aware training computed


def fp32_bound(probe: Probe) -> float:
    """Return how far float32 logits may be from those of a probe."""
    return MAX_FP32_LOGIT_DIFF * max(1.0, float(abs(probe.logits).max()) / FP32_LOGIT_SIZE)


@torch.inference_mode()
def probe_logits(model: GPT, probe: Probe) -> Float[Tensor, "P V"]:
    """Return a module's logits at the probe's positions."""
    T, positions = probe.tokens.shape[1], torch.from_numpy(probe.positions)
    rows = []
    for index, tokens in enumerate(torch.from_numpy(probe.tokens)):
        here = (positions // T == index).nonzero().flatten()
        rows.append(model(tokens[None].long())[0, positions[here] % T])
    return torch.cat(rows)


def measure(model: GPT, probe: Probe) -> Parity:
    """Compare a module with the logits of the probe."""
    return compare(torch.from_numpy(probe.logits), probe_logits(model, probe))


@torch.inference_mode()
def compare_rows(
    model: GPT, tokens: npt.NDArray[np.int32], reference: Iterable[npt.NDArray[np.floating[Any]]]
) -> Parity:
    """Compare a module with reference logits of every position, one row of tokens (B, T) at a time.

    Args:
      model: the module.
      tokens: ids.
      reference: logits (T, V) of each row.
    """
    meter = ParityMeter()
    for row, expected in zip(torch.from_numpy(tokens), reference, strict=True):
        meter.add(torch.from_numpy(expected), model(row[None].long())[0])
    return meter.result()


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
    measured = {
        name: INT8_KL_FACTOR * getattr(parity, name) + INT8_KL_SLACK for name in ("kl_mean", "kl_max")
    }
    claim_text, max_claim_text = (
        f"certified KL {name.removeprefix('kl_')} {float(certified[name]):.2e} <= {limit:.2e}, "
        "from what is measured"
        for name, limit in measured.items()
    )
    top1_claim = parity.top1_agreement - INT8_TOP1_SLACK
    return {
        claim_text: float(certified["kl_mean"]) <= measured["kl_mean"]
        and float(certified["top1_agreement"]) >= top1_claim,
        max_claim_text: float(certified["kl_max"]) <= measured["kl_max"],
        mean_text: parity.kl_mean <= kl_bound["kl_mean"],
        max_text: parity.kl_max <= kl_bound["kl_max"],
        top1_text: parity.top1_agreement >= top1_bound,
    }
