"""int4-dynamic-head: as int4-dynamic, but the head (and the token embedding that it is) has 4 bits.

jaxgpt-export quantize --artifact ART --method int4-dynamic-head --data DATA --out ART4
"""

from jaxgpt_export.quantize.methods.int4_dynamic import RoundedInputs
from jaxgpt_export.quantize.methods.int4_weight_only_head import Int4WeightOnlyHead


class Int4DynamicHead(RoundedInputs, Int4WeightOnlyHead):
    """4 bits in the blocks and the head, a scale a token at run time."""


METHOD = Int4DynamicHead()
