"""How many steps a training takes in the time there is, and what follows the number of steps."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.shared.presets import find_preset

# Text that a model meets for the fifth time teaches less than new text, after some sixteen times next to
# nothing: Muennighoff and others 2023, arXiv:2305.16264.
MAX_PASSES, GOOD_PASSES = 16, 4
LEAST_STEPS = 20
ENOUGH_STEPS = 1000  # with fewer a smaller batch takes more of them in the same time
LEAST_BATCH = 16
CHECKPOINT_S = 100.0  # what a cut training loses at most
VALIDATION_SHARE = 0.05  # of a training's time
MOST_VALIDATIONS = 20
FORWARD_SHARE = 1 / 3  # of a step's time a token: what a validation takes
CHECKPOINT_SHARE = 0.02  # of a training's time, which saving takes


class TooShortError(Exception):
    """There are `available_s` seconds for a training whose LEAST_STEPS take `needed_s`."""

    def __init__(self, available_s: float, needed_s: float) -> None:
        super().__init__()
        self.available_s, self.needed_s = available_s, needed_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """How long a training is.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences a step.
      tokens_per_step: of all devices.
      passes: over the training text.
      capped: more would fit into the time, but the text would come more than MAX_PASSES times.
      seconds: of steps, validations and checkpoints.
    """

    steps: int
    batch_size: int
    tokens_per_step: int
    passes: float
    capped: bool
    seconds: float

    def __str__(self) -> str:
        tokens = self.steps * self.tokens_per_step
        text = (
            f"{self.steps:,} steps of {self.tokens_per_step:,} tokens, {tokens / 1e6:,.1f} million, "
            f"{self.passes:.1f} passes over the text"
        )
        if self.capped:
            return f"{text}: no more, as a text read {MAX_PASSES} times teaches nothing new"
        return f"{text} (after {GOOD_PASSES} it teaches less)" if self.passes > GOOD_PASSES else text


def length_of(
    available_s: float,
    step_s: float,
    batch_size: int,
    block_size: int,
    train_tokens: int,
    val_tokens: int,
    halves: bool,
    devices: int = 1,
    micro_batch: int = 1,
) -> Length:
    """Choose the number of steps.

    Args:
      available_s: seconds for steps, validations and checkpoints.
      step_s: of a step of that batch.
      batch_size: sequences a step.
      block_size: tokens a sequence.
      train_tokens: of the data set.
      val_tokens: of the data set.
      halves: whether the batch may be halved, at the same tokens a second, where there would be few steps.
      devices: that share it evenly, whatever its half.
      micro_batch: sequences of one, all devices together: a half has whole ones, or is smaller than one.

    Raises:
      TooShortError: there is no time for LEAST_STEPS.
    """
    last_s = validation_s(val_tokens, step_s / (batch_size * block_size))
    available_s -= last_s
    each_s = step_s * (1 + VALIDATION_SHARE + CHECKPOINT_SHARE)
    steps = math.floor(available_s / each_s)
    while halves and steps < ENOUGH_STEPS and batch_size % 2 == 0 and batch_size // 2 >= LEAST_BATCH:
        half = batch_size // 2
        if half % devices or (half > micro_batch and half % micro_batch):
            break
        batch_size, each_s = half, each_s / 2
        steps = math.floor(available_s / each_s)
    tokens_per_step = batch_size * block_size
    most = max(MAX_PASSES * train_tokens // tokens_per_step, LEAST_STEPS)
    if steps < LEAST_STEPS:
        raise TooShortError(available_s, LEAST_STEPS * each_s)
    return Length(
        steps=min(steps, most),
        batch_size=batch_size,
        tokens_per_step=tokens_per_step,
        passes=min(steps, most) * tokens_per_step / train_tokens,
        capped=steps > most,
        seconds=min(steps, most) * each_s + last_s,
    )


def validation_s(val_tokens: int, token_s: float) -> float:
    """Return the seconds of a validation; `token_s` are those of a trained token."""
    return val_tokens * token_s * FORWARD_SHARE


def settings_of(length: Length, recipe: Mapping[str, Any], token_s: float, val_tokens: int) -> dict[str, Any]:
    """Return the settings that follow the number of steps.

    Args:
      length: of the training.
      recipe: settings that it would have, the preset among them.
      token_s: seconds of a trained token.
      val_tokens: of the data set.
    """
    steps, step_s = length.steps, token_s * length.tokens_per_step
    validations = VALIDATION_SHARE * steps * step_s / max(validation_s(val_tokens, token_s), 1e-9)
    eval_every = math.ceil(steps / min(max(math.floor(validations), 1), MOST_VALIDATIONS))
    checkpoint_every = min(max(round(CHECKPOINT_S / step_s), 1), steps)
    # One is a multiple of the other: the best checkpoint is sought among those whose loss was measured.
    if eval_every > checkpoint_every:
        times = math.ceil(eval_every / checkpoint_every)
        checkpoint_every = math.ceil(eval_every / times)
        eval_every = times * checkpoint_every
    else:
        checkpoint_every = max(checkpoint_every // eval_every, 1) * eval_every
    preset = find_preset(recipe["preset"]).train
    shares = {}
    for name in ("warmup_steps", "momentum_warmup_steps"):
        of = recipe["max_steps"] if name in recipe else preset.max_steps
        shares[name] = min(round(recipe.get(name, getattr(preset, name)) / of * steps), steps // 2)
    return {
        "max_steps": steps,
        **shares,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "sample_every": 0,
    }
