"""What Muon's products cost beside a step's, in floating point operations."""

from jaxgpt.shared.architecture import flops_per_token, parameters
from jaxgpt.shared.config import ModelConfig

ITERATIONS = 5  # of Newton-Schulz


def newton_schulz_flops(model: ModelConfig, *, split_qkv: bool) -> float:
    """Return the floating point operations of making all matrices of the blocks orthogonal once.

    Of a matrix of m rows and n >= m columns an iteration multiplies (m, n) by (n, m), (m, m) by (m, m) and
    (m, m) by (m, n).
    """
    total = 0
    for each in parameters(model):
        if each.group != "matrix":
            continue
        outputs, inputs = each.shape
        parts = 3 if split_qkv and each.layer.name.endswith("attn.c_attn") else 1
        m, n = sorted((outputs // parts, inputs))
        total += parts * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return float(total)


def muon_cost(model: ModelConfig, tokens: int, *, split_qkv: bool) -> float:
    """Return a step's operations with Muon as a multiple of those with AdamW, whose own count for nothing.

    Args:
      model: shape.
      tokens: of a step.
      split_qkv: as the setting.
    """
    return 1 + newton_schulz_flops(model, split_qkv=split_qkv) / (flops_per_token(model) * tokens)
