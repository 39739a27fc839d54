"""What `jaxgpt-bench native` tells beside speed: how near the logits are, and how soon a model is loaded."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import build_model
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import CacheKind, NativeSession

from jaxgpt_bench.common.rows import Spread


def parity_figures(
    model: NativeModel, artifact: Artifact, reference: Artifact, text: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Compare the logits of one text: engine, module, the module in single steps, float32 weights.

    Where inputs are rounded to 8 bits, engine and module compute the same bits from keys and values of the
    same precision; so the module is asked both with those of float32 and with the cache's own.
    """
    module, whole = build_model(artifact), torch.from_numpy(text)[None]
    with torch.inference_mode():
        exact = build_model(reference)(whole)[0].numpy()
        ours = module(whole)[0].numpy()
        halves = module(whole, module.new_cache(rounded_to=torch.float16))[0].numpy()
    session = TorchSession(module)
    half = len(text) // 2
    steps = [session.prefill(text[:half].tolist())] + [session.decode(int(token)) for token in text[half:]]
    error = float(np.abs(ours - exact).max())
    found: dict[str, Any] = {
        "quantization_error_max": error,
        "module_from_itself_in_steps_max": float(np.abs(np.stack(steps) - ours[half - 1 :]).max()),
    }
    alike: dict[CacheKind, npt.NDArray[np.float32] | None] = {"fp32": ours, "fp16": halves, "int8": None}
    for cache, same in alike.items():  # the module has no cache of int8
        native_logits = NativeSession(model, cache=cache).forward(text.tolist(), all_logits=True)
        difference = np.abs(native_logits - ours)
        differ = native_logits.argmax(1) != ours.argmax(1)
        ordered = np.sort(ours, axis=1)
        margin = ordered[:, -1] - ordered[:, -2]
        found[cache] = {
            "max": float(difference.max()),
            "share_of_quantization_error": float(difference.max()) / error,
            "median_position_share": float(np.median(difference.max(axis=1))) / error,
            "largest_token_differs": int(differ.sum()),
            "of_these_with_a_margin_above_the_difference": int((margin[differ] > difference.max()).sum()),
        }
        if same is not None:
            furthest = float(np.abs(native_logits - same).max())
            found[cache]["module_with_this_cache"] = {
                "max": furthest,
                "share_of_quantization_error": furthest / error,
                "share_of_logits_with_the_same_bits": float((native_logits == same).mean()),
            }
    return found


def load_figures(folder: Path, threads: int) -> dict[str, Any]:
    """Load an artifact in a fresh process: seconds to the first token, memory then and later."""
    command = [sys.executable, "-P", "-m", "jaxgpt_bench.speed.load_process", str(folder), str(threads)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    size = (folder / "model.safetensors").stat().st_size
    memory = {name: statistics.median(run[name] for run in runs) for name in ("first", "grown", "peak")}
    return {
        "seconds_to_first_token": Spread.of([run["seconds"] for run in runs]).to_json(),
        "artifact_mb": size / 1e6,
        **{f"{name}_mb": grown / 1e6 for name, grown in memory.items()},
        **{f"{name}_times_artifact": grown / size for name, grown in memory.items()},
    }
