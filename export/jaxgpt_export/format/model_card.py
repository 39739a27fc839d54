"""The README.md of an artifact: its model card, written from certificate and configuration.

What it says stands in certificate.json and config.json too; it is for people, and no reader interprets it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.files import write_atomic

from jaxgpt_export.format.generation_config import read_generation_config

FLOAT = "fp32"
LONGEST = 100  # characters of a licence's or data set's name


def write_model_card(folder: Path, config: ModelConfig, certificate: Mapping[str, Any]) -> None:
    """Write README.md into an artifact folder.

    Args:
      folder: with weights and certificate in place.
      config: shape.
      certificate: what certificate.json holds.
    """
    size_mb = (folder / "model.safetensors").stat().st_size / 1e6
    parts = [
        _front_matter(certificate["origin"]),
        f"# GPT-2, {certificate['kind']}",
        _what_it_is(config, certificate["kind"], size_mb),
        "## Where it comes from",
        origin_text(certificate["origin"]),
        "## How far it is from its source",
        _parity(certificate),
        "## How to load it",
        _loading(config, certificate["kind"], read_generation_config(folder)),
        "## Licence and data",
        licence_text(certificate["origin"]),
        "Written by jaxgpt from certificate.json and config.json.",
    ]
    write_atomic(folder / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(origin: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: jaxgpt", "pipeline_tag: text-generation"]
    if origin.get("license"):
        lines.append(f"license: {_plain(origin['license'])}")
    if origin.get("datasets"):
        lines += ["datasets:", *(f"- {_plain(name)}" for name in origin["datasets"])]
    if str(origin.get("source", "")).startswith("hub:"):
        lines.append(f"base_model: {origin['source'].removeprefix('hub:')}")
    return "\n".join([*lines, "---"])


def _plain(text: object) -> str:
    """Return a text written elsewhere without what YAML or Markdown would read as more than text."""
    kept = re.sub(r"[^A-Za-z0-9./_ ,+-]", "", str(text)).strip(" ,+-")[:LONGEST]
    return kept if re.search("[A-Za-z]", kept) else f"'{kept}'"


def _what_it_is(config: ModelConfig, kind: str, size_mb: float) -> str:
    count = sum(math.prod(each.shape) for each in parameters(config))
    head = "tied to the token embedding" if config.tied else "of its own"
    rows = {
        "kind": "float32" if kind == FLOAT else kind,
        "parameters": f"{count:,}",
        "layers, channels, heads": f"{config.n_layer}, {config.n_embd}, {config.n_head}",
        "context": f"{config.block_size:,} tokens, {config.positions} positions",
        "vocabulary": f"{config.vocab_size:,} tokens, head {head}",
        "model.safetensors": f"{size_mb:.2f} MB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def origin_text(origin: Mapping[str, Any]) -> str:
    """Say where a model comes from, by its certificate's origin."""
    if origin.get("run"):
        named = origin.get("preset") not in (None, "custom")
        preset = f", begun from the preset {origin['preset']}" if named else ""
        return f"Trained by jaxgpt: step {origin['step']} of the run `{Path(origin['run']).name}`{preset}."
    commit = f", commit `{origin['commit']}`" if origin.get("commit") else ""
    return f"Imported from `{origin.get('source', 'an unnamed source')}`{commit}."


def _parity(certificate: Mapping[str, Any]) -> str:
    parity = certificate["parity"]
    against = parity.get("against", "Flax fp32")
    if certificate["kind"] == FLOAT:
        return f"Its logits differ from those of {against} by at most {parity['max_abs_logit_diff']:.1e}."
    lines = [
        f"Against {against}: KL divergence {parity['kl_mean']:.1e} nats a token on average, "
        f"{parity['kl_max']:.1e} at most; the same most likely token at {parity['top1_agreement']:.1%} of "
        "positions."
    ]
    quality = certificate.get("quality")
    if quality:
        lines.append(
            f"On {quality['tokens']:,} held-out tokens the loss goes from {quality['float_loss']:.4f} to "
            f"{quality['quantized_loss']:.4f} nats a token ({quality['loss_increase']:+.5f})."
        )
    else:
        lines.append("What this costs in loss was not measured: quantize with --data to know.")
    return " ".join(lines)


def _loading(config: ModelConfig, kind: str, generation: Mapping[str, int | float]) -> str:
    lines = [
        "```python",
        "from jaxgpt import LLM",
        "",
        'llm = LLM.load("FOLDER")  # this folder',
        'print(llm.generate("Once upon a time", max_new_tokens=60))',
        "```",
        "",
        "In a terminal: `jaxgpt-export generate --artifact FOLDER`. `jaxgpt-export verify --artifact FOLDER` "
        "measures the certificate anew.",
    ]
    if generation:
        how = ", ".join(f"{name} {value:g}" for name, value in generation.items())
        lines.append(f"Its tokens are drawn with {how}, unless told otherwise (generation_config.json).")
    if kind == FLOAT and config.positions == "learned":
        lines.append(
            "`transformers.AutoModelForCausalLM.from_pretrained(FOLDER)` loads it too: it is a GPT-2 folder."
        )
    return "\n".join(lines)


def licence_text(origin: Mapping[str, Any]) -> str:
    """Say what a model was trained on, and under which licence its source is."""
    data = origin.get("data") or {}
    if origin.get("datasets"):
        trained_on = f"Trained on {', '.join(map(_plain, origin['datasets']))}, as its card on the hub says."
    elif data.get("folder"):
        trained_on = f"Trained on the data set `{Path(data['folder']).name}`."
    else:
        trained_on = "What it was trained on is not known here."
    licence = origin.get("license")
    said = (
        f"Its source is under the licence {_plain(licence)}." if licence else "Its licence is not known here."
    )
    return f"{trained_on} {said}"
