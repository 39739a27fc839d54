"""What each layer costs when it alone is rounded."""

from typing import Any

from jaxgpt.shared.architecture import matrices

from jaxgpt_export.quantize.methods import Method
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict


def sensitivity(quantizer: Quantizer, candidate: QuantizedStateDict) -> list[dict[str, Any]]:
    """Measure what each matrix costs when it alone is rounded, the costliest first.

    Returns:
      A row a matrix: layer, bits, loss_increase, kl_mean, kl_max, on held-out training text.
    """
    rows = []
    for name in matrices(quantizer.config):
        bits = candidate.quantization.layers[name].weight_bits
        if bits == 32:
            continue
        increase, parity = quantizer.cost(quantizer.only(candidate, name))
        row = {"layer": name, "bits": bits, "loss_increase": increase}
        rows.append({**row, "kl_mean": parity.kl_mean, "kl_max": parity.kl_max})
    return sorted(rows, key=lambda row: row["kl_mean"], reverse=True)


def worst_layers(
    quantizer: Quantizer, method: Method, candidate: QuantizedStateDict, count: int
) -> list[str]:
    """Return the matrices that cost most, of those that the method can keep in higher precision."""
    pinned = method.pinned(quantizer.config)
    rows = [row for row in sensitivity(quantizer, candidate) if row["layer"] not in pinned]
    return [row["layer"] for row in rows[:count]]
