"""The README.md of a folder for ONNX Runtime: what the model is, what goes in and out, what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.files import write_atomic

from jaxgpt_export.format.model_card import licence_text, origin_text
from jaxgpt_export.interchange.onnx.graph import DATA_FILE, INTERFACE, MODEL_FILE, model_bytes
from jaxgpt_export.interchange.onnx.precision import Precision

FRONT_MATTER = "---\nlibrary_name: onnxruntime\npipeline_tag: text-generation\n---"


def write_readme(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    origin: Mapping[str, Any],
    measured: Mapping[str, float],
) -> None:
    """Write README.md.

    Args:
      folder: with the model in place.
      config: shape.
      precision: of the matrices.
      origin: of the artifact's certificate.
      measured: by `check.check_folder`.
    """
    shape = f"{config.n_layer} layers, {config.n_embd} channels, {config.n_head} heads"
    parts = [
        FRONT_MATTER,
        f"# GPT-2 for ONNX Runtime, {precision}",
        f"{shape}, a context of {config.block_size:,} tokens, a vocabulary of {config.vocab_size:,}; "
        f"{MODEL_FILE} and {DATA_FILE}, which lie side by side, take {model_bytes(folder) / 1e6:.2f} MB.",
        "## What goes in and out",
        _table(config),
        "T tokens go in at once: a prompt, or one after the other. Bind `past_key_values.N` and `present.N` "
        "to the same memory (IO binding): then a step writes the new keys and values alone. ONNX Runtime "
        "1.23 or newer runs it, on a CPU.",
        "## How far it is from the float32 model",
        _distance(precision, measured),
        "## Where it comes from",
        origin_text(origin),
        licence_text(origin),
        "Written by jaxgpt-export onnx.",
    ]
    write_atomic(folder / "README.md", "\n\n".join(parts) + "\n")


def _table(config: ModelConfig) -> str:
    sizes = (
        f"H = {config.n_head}, S = {config.block_size}, D = {config.n_embd // config.n_head}, "
        f"V = {config.vocab_size}, N = 0 to {config.n_layer - 1}"
    )
    rows = [f"| `{name}` | {text} |" for name, text in INTERFACE.items()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows]) + f"\n\n{sizes}."


def _distance(precision: Precision, measured: Mapping[str, float]) -> str:
    if precision == "float32":
        return f"Its logits differ from the probe's by at most {measured['max_abs_logit_diff']:.1e}."
    return (
        f"On the probe of the artifact: KL divergence {measured['kl_mean']:.1e} nats a token on average, "
        f"{measured['kl_max']:.1e} at most; the same most likely token at "
        f"{measured['top1_agreement']:.1%} of positions. What this costs in loss was not measured."
    )
