"""The bits of artifacts stay what they were: hashes of what version 2 of the quantization section held.

int4-dynamic's are later: its groups have whole factors now. Only rounding to nearest is hashed: calibration
and GPTQ multiply matrices, whose float sums differ between CPUs.
"""

import hashlib

import numpy as np
import pytest
import torch
from jaxgpt_export.format.scheme import has_factors
from jaxgpt_export.model.build import as_arrays
from jaxgpt_export.quantize.gptq import round_groups
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.state_dict import quantized_state_dict

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig

CONFIG = ModelConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=32)
SHA256 = {
    "fp16": "7c0b9ca5f8b3e1edaefcbb6c252bb65ad4601626161a51cf1aaafebc04bf28f7",
    "int8-dynamic": "af3c616a9b5f171a8234698e382538e5ea405f17f391e25c8cd29e7eb5bc813f",
    "int4-weight-only": "31f37f6573bfd3b3b469dd9ef91042b58bd10e7e83398d416483837f7f9f1db9",
    "int4-weight-only-head": "f41a48d9e749188c023120fef71a2b1c27dfb49ae76a9d8bc27ea93e104670c9",
    "int4-dynamic": "8f52e455c99079779474177896eace9515c6cd8462ebac391ce18c0f4bcf0f5c",
    "int4-dynamic-head": "ce776f5f035d7ff7b4da5ed04fc139f0e4b00c2f78cfbae0f7f6be16a357fdf0",
    "int8-weight-only": "af3c616a9b5f171a8234698e382538e5ea405f17f391e25c8cd29e7eb5bc813f",
}


@pytest.mark.parametrize("name", SHA256)
def test_weights_are_rounded_to_the_same_bits_as_ever(name: str) -> None:
    shapes = {each.name: each.shape for each in parameters(CONFIG)}
    tensors = {
        key: torch.from_numpy(np.random.default_rng(seed).standard_normal(shapes[key]).astype(np.float32))
        for seed, key in enumerate(sorted(shapes))
    }
    schemes = find_method(name).schemes(CONFIG)
    groups = {
        key: round_groups(tensors[f"{key}.weight"], scheme.group_size, has_factors(key, schemes, CONFIG))
        for key, scheme in schemes.items()
        if scheme.weight_bits == 4 and f"{key}.weight" in tensors
    }
    found = as_arrays(quantized_state_dict(CONFIG, tensors, name, schemes, groups=groups).tensors)
    digest = hashlib.sha256()
    for key in sorted(found):
        digest.update(key.encode())
        digest.update(found[key].tobytes())
    assert digest.hexdigest() == SHA256[name]
