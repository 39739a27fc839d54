"""Where a training step's time goes on a GPU: `jaxgpt-bench train --profile`, in a process of its own."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json
from jaxgpt_bench.reproduce.recipes import Recipe

LONGEST_S = 300.0
MODEL_SETTINGS = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "attn_dropout")
ROUNDS, STEPS = 2, 10


def profile_command(recipe: Recipe, attempt: Mapping[str, Any]) -> list[str]:
    """Return the command, from `train` on: the recipe's model, one device, a batch that is one micro-batch.

    Args:
      recipe: with what was planned.
      attempt: how its training was tried; see probe.Attempt.
    """
    settings = recipe.train
    micro = attempt["tokens_per_step"] // attempt["block_size"] // attempt["devices"]
    micro //= attempt["settings"].get("grad_accum_steps", 1)
    given = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    given |= {"batch_size": micro, "precision": attempt["precision"]}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    if settings.get("remat"):
        words.append("--remat")
    return [
        "train",
        settings["preset"],
        *words,
        "--alone",
        "--profile",
        f"--rounds={ROUNDS}",
        f"--steps={STEPS}",
    ]


def step_profile(command: Sequence[str]) -> dict[str, Any]:
    """Run it; what fails is told and noted, and stops nothing: {"failed": why}."""
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as scratch:
        out = Path(scratch) / "profile.json"
        words = [sys.executable, "-m", "jaxgpt_bench", *command, "--out", str(out)]
        try:
            code = subprocess.run(words, timeout=LONGEST_S, check=False).returncode
            why = f"it left with code {code}"
        except subprocess.TimeoutExpired:
            why = f"it took longer than {LONGEST_S:.0f} s"
        try:
            return read_json(out, "profile")
        except UserError:
            say(f"[profile] left out: {why} ({' '.join(words)})")
            return {"failed": why}
