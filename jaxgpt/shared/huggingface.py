"""What a Hugging Face GPT-2 folder says, without any framework: names of tensors, fields of config.json.

The parameters' names are GPT-2's own on both sides; only the last part differs, and all but the head's lie
under `transformer.`. Layouts agree: Flax kernels and Hugging Face's Conv1D are both (I, O).
"""

from typing import Any

MODEL_TYPE = "gpt2"
OWN_MODEL_TYPE = "jaxgpt_gpt2"  # of what other loaders must not read as a GPT-2
PREFIX = "transformer."
HEAD = "lm_head."

# The last part of a Flax name -> of Hugging Face's.
LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# ModelConfig's field -> config.json's.
SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}

# What is computed; another value in a config.json would be ignored, so it is refused.
FIXED_SETTINGS: dict[str, Any] = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a Flax parameter.

    Args:
      name: such as "h.0.attn.c_attn.kernel" or "lm_head.embedding".
    """
    stem, _, leaf = name.rpartition(".")
    theirs = f"{stem}.{LEAF_NAMES[leaf]}"
    return theirs if theirs.startswith(HEAD) else PREFIX + theirs
