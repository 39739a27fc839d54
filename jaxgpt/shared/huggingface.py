"""The config.json of a GPT-2 folder in Hugging Face's layout: the one reader of it, and what it must say.

Whatever computes something else than this project's GPT-2 is refused, never ignored; so is a field whose
value has another type than transformers takes. Tensors of causal masks and of other heads than the language
model's are named here too: they may stand in its file.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from jaxgpt.shared.architecture import LAYER_NORM_EPSILON
from jaxgpt.shared.config import ModelConfig, Positions
from jaxgpt.shared.errors import UserError, damaged, quoted
from jaxgpt.shared.files import read_json

MODEL_TYPE = "gpt2"
OWN_MODEL_TYPE = "jaxgpt_gpt2"  # of what other loaders must not read as a GPT-2

# ModelConfig's field -> config.json's.
SHAPE_FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# name -> values under which transformers computes what this project computes; the first is the default, and
# what is written
SETTINGS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
WRITTEN_SETTINGS = {
    "n_inner": None,
    **{name: SETTINGS[name][0] for name in list(SETTINGS)[:3]},
    "scale_attn_by_inverse_layer_idx": False,
}
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
# Names that transformers takes for others, too.
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Fields that decide nothing here, and what transformers takes in them: types, and how messages call them.
_TRUTH = ((bool,), "true or false")
_ID = ((int, type(None)), "a whole number or null")
_TEXT = ((str,), "a text")
FIELD_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "n_inner": _ID,
    "initializer_range": ((float,), "a number with a point, such as 0.02"),
    "layer_norm_epsilon": ((float,), "a number with a point, such as 1e-05"),
    **dict.fromkeys((*DROPOUTS, "summary_first_dropout"), ((float, int), "a number")),
    "activation_function": _TEXT,
    "summary_type": _TEXT,
    "summary_activation": ((str, type(None)), "a text or null"),
    "summary_use_proj": _TRUTH,
    "summary_proj_to_labels": _TRUTH,
    "use_cache": _TRUTH,
    "reorder_and_upcast_attn": _TRUTH,
    "bos_token_id": _ID,
    "eos_token_id": ((int, list, type(None)), "a whole number, several, or null"),
    "pad_token_id": _ID,
}
# Tensors beside the language model's: causal masks, which older versions of transformers, nanoGPT and minGPT
# store; and heads on GPT2Model of transformers and TRL for choices, values, classes and answers.
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
OTHER_HEAD = re.compile(r"(multiple_choice_head|v_head|value_head|score|classifier|qa_outputs)\..+")


@dataclasses.dataclass(frozen=True)
class HfConfig:
    """What a config.json says.

    Attributes:
      model: shape; without dropout.
      dropout: of embeddings and residuals, where they are the same one; else 0, and so is attn_dropout.
      attn_dropout: of attention weights, where it is another one.
      model_type: gpt2, or this project's own.
      quantization: the section of that name as it stands; None without one.
      scales_by_layer: layer i's attention scores are also divided by i + 1, which this project's GPT-2 does
        not do (scale_attn_by_inverse_layer_idx): an import puts the factors into the weights.
    """

    model: ModelConfig
    dropout: float
    attn_dropout: float | None
    model_type: str
    quantization: Any
    scales_by_layer: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is of a Hugging Face GPT-2 in float32, with learned positions."""
        return self.model_type == MODEL_TYPE


def is_unused(name: str) -> bool:
    """Whether a tensor of GPT-2's file, by its name without "transformer.", is none of the language model."""
    return bool(MASK.fullmatch(name) or OTHER_HEAD.fullmatch(name))


def check_field_types(value: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for the first field of a config.json of GPT-2 whose value transformers does not take.

    Args:
      value: what the file says.
      path: of it, for messages.
    """
    for name, (types, expected) in FIELD_TYPES.items():
        found = value.get(name, types)
        inner = found if isinstance(found, list) else []
        if name in value and (type(found) not in types or any(type(each) is not int for each in inner)):
            raise UserError(f"{path} has {name} {quoted(found)}, expected {expected}; correct it there")


def _under_own_names(value: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a config.json says, ALIASES replaced; UserError where two names contradict each other."""
    own = dict(value)
    for alias, name in ALIASES.items():
        if alias in own:
            other = own.pop(alias)
            if own.setdefault(name, other) != other:
                raise UserError(
                    f"{path} has {name} {quoted(own[name])} and {alias} {quoted(other)}, which are the same; "
                    "leave one out"
                )
    return own


def _model_type(value: Mapping[str, Any]) -> Any:
    """Return its model_type; gpt2 where none is said and what is said is a GPT-2's."""
    named = value.get("architectures") or ["GPT2"]
    theirs = isinstance(named, list) and str(named[0]).startswith("GPT2")
    if "model_type" not in value and theirs and value.keys() >= set(SHAPE_FIELDS.values()):
        return MODEL_TYPE
    return value.get("model_type")


def model_type_of(path: Path, what: str) -> Any:
    """Return the model_type of a config.json, of which nothing else is checked; see read_hf_config.

    Args:
      path: the file.
      what: its role, for messages.

    Raises:
      UserError: it is missing or damaged, or two of its names contradict each other.
    """
    return _model_type(_under_own_names(read_json(path, what), path))


def read_hf_config(path: Path, what: str, may_scale_by_layer: bool = False) -> HfConfig:
    """Read and check a config.json.

    Args:
      path: the file.
      what: its role, for messages.
      may_scale_by_layer: whoever reads it can deal with scales_by_layer; else it is refused.

    Raises:
      UserError: it is missing, damaged, not GPT-2's, or has a setting that changes the computation.
    """
    value = _under_own_names(read_json(path, what), path)
    kind, positions = _model_type(value), value.get("positions", "learned")
    if value.get("model_type") is None and "preset" in value:
        raise UserError(
            f"{path} has no model_type: {path.parent} is a run; make an artifact of it with: jaxgpt-export "
            f"convert --run {path.parent} --out FOLDER"
        )
    if kind not in (MODEL_TYPE, OWN_MODEL_TYPE) or (kind == MODEL_TYPE and "positions" in value):
        raise UserError(f"{path} has model_type {quoted(kind)}, expected {MODEL_TYPE} or {OWN_MODEL_TYPE}")
    shape = _shape(value, path)
    tied = value.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path} has tie_word_embeddings {quoted(tied)}, expected true or false")
    if positions not in get_args(Positions):
        raise UserError(f"{path} has positions {quoted(positions)}, expected learned or rotary")
    _check_settings(value, path)
    check_field_types(value, path)
    scales_by_layer = value.get("scale_attn_by_inverse_layer_idx", False)
    if scales_by_layer not in (False, True)[: 1 + may_scale_by_layer]:
        raise UserError(
            f"{path} has scale_attn_by_inverse_layer_idx {quoted(scales_by_layer)}, which changes the "
            "computation; jaxgpt-export import-hf puts true into the weights, then it is false"
        )
    with damaged(path, "fetch it again"):
        of_weights, of_embeddings, of_residuals = (float(value.get(name, 0.1)) for name in DROPOUTS)
        if of_embeddings != of_residuals:
            of_weights = of_residuals = 0.0
        dropout, attn_dropout = of_residuals, None if of_weights == of_residuals else of_weights
        model = ModelConfig(**shape, positions=positions, tied=tied)
        dataclasses.replace(model, dropout=dropout, attn_dropout=attn_dropout)  # checks them
    return HfConfig(model, dropout, attn_dropout, kind, value.get("quantization"), bool(scales_by_layer))


def _shape(value: Mapping[str, Any], path: Path) -> dict[str, Any]:
    missing = [theirs for theirs in SHAPE_FIELDS.values() if value.get(theirs) is None]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is it the folder of a GPT-2?")
    for theirs in SHAPE_FIELDS.values():
        if type(value[theirs]) is not int:
            raise UserError(f"{path} has {theirs} {quoted(value[theirs])}, expected a whole number")
    return {ours: value[theirs] for ours, theirs in SHAPE_FIELDS.items()}


def _check_settings(value: Mapping[str, Any], path: Path) -> None:
    for name, allowed in SETTINGS.items():
        if value.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{path} has {name} {quoted(value[name])}, which changes the computation; "
                f"this program computes {allowed[0]!r} only"
            )
    if value.get("n_inner") not in (None, 4 * value["n_embd"]):
        raise UserError(
            f"{path} has n_inner {quoted(value['n_inner'])}, expected 4 n_embd = {4 * value['n_embd']}"
        )


def hf_config_json(config: ModelConfig, endoftext: int, quantization: Any = None) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
      config: shape.
      endoftext: id of <|endoftext|>.
      quantization: the section of that name; None for float32.
    """
    value: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "initializer_range": 0.02,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "attn_pdrop": config.attn_rate,
        **WRITTEN_SETTINGS,
        "tie_word_embeddings": config.tied,
        "bos_token_id": endoftext,
        "eos_token_id": endoftext,
        "dtype": "float32",
    }
    if config.positions != "learned":
        value["positions"] = config.positions
    if config.positions != "learned" or quantization is not None:
        value |= {"architectures": ["JaxgptGPT2"], "model_type": OWN_MODEL_TYPE}
    if quantization is not None:
        value["quantization"] = quantization
        del value["dtype"]
    return value
