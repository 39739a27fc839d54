"""The .bin file of llm.c: a header of 256 int32, then GPT-2's parameters, each of all layers in a row.

    header   20240326, version, n_positions, vocab_size, n_layer, n_head, n_embd, padded vocab_size, 0, ...
    version  3: float32; 5: bfloat16
    order    wte, wpe, ln_1, c_attn, c_proj, ln_2, c_fc, mlp.c_proj, ln_f; matrices (O, I); the head is tied

Source: github.com/karpathy/llm.c, train_gpt2.py write_model and dev/eval/export_hf.py. GELU is by tanh.
"""

import math
from pathlib import Path

import numpy as np
import torch
from jaxgpt.shared.errors import UserError
from torch import Tensor

MAGIC = 20240326
HEADER_BYTES = 1024
TOKENS = "tokens"  # of the vocabulary, without padding
DTYPES = {3: torch.float32, 5: torch.bfloat16}
LAYER_PARTS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)  # fmt: skip


def is_llm_c(path: Path) -> bool:
    """Whether a file begins as llm.c's model files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_llm_c(path: Path) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """Read a model file of llm.c.

    Returns:
      Tensors by GPT-2's names, those of a padded vocabulary with the padding; what nanoGPT calls model_args,
      without vocab_size, and the number of tokens without the padding; and where they stand.

    Raises:
      UserError: it is of another version, or not as long as its header says.
    """
    content = np.fromfile(path, np.uint8)
    if len(content) < HEADER_BYTES:
        raise UserError(f"{path} is a file of llm.c that ends within its header; copy it again")
    header = content[:HEADER_BYTES].view("<i4").tolist()
    version, T, V, L, H, C, padded = header[1:8]
    if version not in DTYPES:
        raise UserError(
            f"{path} is a file of llm.c of version {version}, expected 3 (float32) or 5 (bfloat16); write it "
            "with the current train_gpt2.py of llm.c"
        )
    if min(T, V, L, H, C) < 1 or padded < V:
        raise UserError(
            f"{path} is a file of llm.c with the shape {header[2:8]}, which no model has; copy it again"
        )
    dtype = DTYPES[version]
    shapes = _shapes(T, L, C, padded)
    expected = HEADER_BYTES + dtype.itemsize * sum(map(math.prod, shapes.values()))
    if len(content) != expected:
        raise UserError(
            f"{path} is a file of llm.c of {len(content):,} bytes, expected {expected:,} for {L} layers of "
            f"{C} channels; copy it again"
        )
    values, start = torch.from_numpy(content[HEADER_BYTES:]).view(dtype), 0
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        whole, start = values[start:stop].view(shape), stop
        if name in LAYER_PARTS:
            tensors |= {f"h.{layer}.{name}": part for layer, part in enumerate(whole)}
        else:
            tensors[name] = whole
    return tensors, {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, TOKENS: V}, "its header"


def _shapes(T: int, L: int, C: int, V: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, those of a layer with the layers in front, in the file's order."""
    sizes = {"c_attn": (3 * C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C), "attn.c_proj": (C, C)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    for name in LAYER_PARTS:
        O, I = next((size for part, size in sizes.items() if f"{part}." in name), (C, C))
        whole = "ln_" not in name and name.endswith("weight")
        shapes[name] = (L, O, I) if whole else (L, O)
    return {**shapes, "ln_f.weight": (C,), "ln_f.bias": (C,)}
