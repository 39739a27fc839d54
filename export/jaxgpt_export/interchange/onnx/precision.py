"""What the matrices of a graph are made of."""

from typing import Literal

Precision = Literal["float32", "int8-dynamic", "int8-weight-only", "int4-weight-only"]
BITS: dict[Precision, int] = {"int8-weight-only": 8, "int4-weight-only": 4}
SMALLEST_BLOCK = 16  # of the weights of a row that share a scale
