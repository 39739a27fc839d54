"""What each layer costs when it alone is rounded."""

from typing import Any

from jaxgpt_export.format.scheme import HEAD, linear_layers
from jaxgpt_export.quantize.quantizer import Quantizer, Rounding


def sensitivity(quantizer: Quantizer, made: Rounding) -> list[dict[str, Any]]:
    """Measure what each layer costs when it alone is rounded, the costliest first.

    Returns:
      A row a layer: layer, bits, loss_increase, kl_mean, kl_max, on held-out training text.
    """
    rows = []
    for name, bits in made.quantization.bits.items():
        if bits == 32:
            continue
        increase, parity = quantizer.cost(quantizer.only(made, name))
        row = {"layer": name, "bits": bits, "loss_increase": increase}
        rows.append({**row, "kl_mean": parity.kl_mean, "kl_max": parity.kl_max})
    return sorted(rows, key=lambda row: row["kl_mean"], reverse=True)


def worst_layers(quantizer: Quantizer, made: Rounding, count: int) -> list[str]:
    """Return the layers that cost most; never a head of 4 bits, which a method of its own keeps at 8."""
    head = linear_layers(quantizer.config)[HEAD]
    rows = [row for row in sensitivity(quantizer, made) if (row["layer"], row["bits"]) != (head, 4)]
    return [row["layer"] for row in rows[:count]]
