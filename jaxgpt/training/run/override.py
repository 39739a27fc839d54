"""Changing a run on purpose, after its first steps: `jaxgpt train ... --override`.

    jaxgpt train tiny --data data/stdlib --out runs/tiny --override --max-steps 200

What the checkpoints hold stays: model, optimizer state, steps done. The steps that follow are taken with the
new settings, and config.json holds those, with a record of the change in its list `overrides`.
"""

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of, write_json
from jaxgpt.training.model.params import init_params, pad_vocabulary
from jaxgpt.training.run.folder import (
    Differences,
    RunConfig,
    differences,
    in_words,
    read_metrics,
    read_run_config,
    stored_steps,
)
from jaxgpt.training.run.training import Training
from jaxgpt.training.step.optimizer import make_optimizer
from jaxgpt.training.step.state import FIRST_LOSS_SCALE, TrainState

# Settings of the model that are no part of its shape.
CHANGEABLE_OF_MODEL = {"model.dropout", "model.attn_dropout"}
# What gives the losses of batches another mean or variance.
CHANGING_LOSSES = CHANGEABLE_OF_MODEL | {"data", "train.batch_size", "train.prompt_loss_weight"}
# What changes the memory that a step or a validation takes: also where the last step's loss is missing.
CHANGING_MEMORY = {"train.grad_accum_steps", "train.loss_chunks", "train.remat"}


def changes(folder: Path, training: Training) -> Differences:
    """Return what a training changes of the run in a folder.

    Args:
      folder: of a run.
      training: with the settings of now. One without --init keeps what the run began with.

    Returns:
      Name of each setting -> what it was and is.

    Raises:
      UserError: there is no run, or something changes that belongs to what the checkpoints hold.
    """
    old, new = read_run_config(folder), training.config
    steps = stored_steps(folder)
    if new.init is None and (steps or old.init is None):
        new = dataclasses.replace(new, init=old.init)
    found = differences(old, new)
    another = f"begin another run with its model: --init {folder} --out ANOTHER"
    if old.data["tokenizer"]["sha256"] != new.data["tokenizer"]["sha256"]:
        raise UserError(
            f"--override can't change the tokenizer: {new.data['folder']} was made with another one than "
            f"{folder}; prepare it with: jaxgpt prepare --tokenizer {folder / 'tokenizer'}"
        )
    if "init" in found:
        raise UserError(
            f"--override can't change what {folder} began with ({in_words(found, 'init')}); "
            + ("leave --init out" if steps else "give --init as it was")
            + ", or begin another run: --out ANOTHER"
        )
    shape = [name for name in found if name.startswith("model.") and name not in CHANGEABLE_OF_MODEL]
    if shape:
        raise UserError(
            f"--override can't change the model of {folder} ({in_words(found, *shape)}); a model of another "
            f"shape is trained anew: --out ANOTHER. With --qat or a shorter context, {another}"
        )
    state = _changing_state(found, old, new)
    if state:
        raise UserError(
            f"--override can't change {in_words(found, *state)}: the checkpoints of {folder} hold another "
            f"optimizer state; {another}"
        )
    last = max(steps, default=0)
    is_left = (
        new.train.max_steps == last and found.keys() <= CHANGING_MEMORY and not _is_measured(folder, last)
    )
    if found and new.train.max_steps <= last and not is_left:
        raise UserError(
            f"{folder} has {last} steps done and max_steps is {new.train.max_steps}, so no step is left that "
            f"--override would change; give --max-steps above {last}"
        )
    return found


def _is_measured(folder: Path, step: int) -> bool:
    return any(row["step"] == step and "val_loss" in row for row in read_metrics(folder))


def _changing_state(found: Differences, old: RunConfig, new: RunConfig) -> list[str]:
    """Return which settings give parameters or optimizer state of other names, shapes or dtypes."""
    before = _state_shapes(old.model, old.train)
    if _state_shapes(old.model, new.train) == before:
        return []
    changing = []
    for name in found:
        section, _, field = name.partition(".")
        with contextlib.suppress(UserError):  # one of two that change together, as batch_size may
            if section == "train" and before != _state_shapes(
                old.model, dataclasses.replace(old.train, **{field: getattr(new.train, field)})
            ):
                changing.append(name)
    return changing or [name for name in found if name.startswith("train.")]


def _state_shapes(model: ModelConfig, train: TrainConfig) -> Any:
    optimizer = make_optimizer(train, model)

    def state() -> Any:
        params = pad_vocabulary(init_params(model, 0), train.vocab_multiple)
        return params, optimizer.init(params)

    leaves, structure = jax.tree.flatten(jax.eval_shape(state))
    return [(leaf.shape, leaf.dtype) for leaf in leaves], structure


def record(folder: Path, config: RunConfig, found: Differences, step: int) -> None:
    """Write the settings of now into config.json, and that they changed.

    Args:
      folder: of the run.
      config: with the settings of now.
      found: what `changes` returned.
      step: after which they hold.
    """
    old = read_run_config(folder)
    entry = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "changed": {name: {"from": was, "to": now} for name, (was, now) in found.items()},
        "config_sha256": sha256_of(folder / "config.json"),
    }
    whole = dataclasses.replace(config, preset=old.preset, init=old.init, overrides=(*old.overrides, entry))
    write_json(folder / "config.json", whole.to_json())


def adapted(
    state: TrainState, saved_precision: str | None, training: Training, other_losses: bool = False
) -> TrainState:
    """Return a restored state as the settings of now need it: its random key, loss scale and spike guard.

    Args:
      state: is given up where it changes.
      saved_precision: of the training that saved it; None if unknown, then its loss scale tells.
      training: with the settings of now.
      other_losses: those to come are of other data or batches, and no spikes because they are higher.
    """
    train, guard = training.train, state.guard
    scaled = saved_precision == "fp16" if saved_precision else float(guard.loss_scale) != 1.0
    key = np.asarray(jax.random.key_data(jax.random.key(train.seed)))
    if not other_losses and scaled == (train.precision == "fp16") and np.array_equal(state.rng, key):
        return state

    def renewed(state: TrainState) -> TrainState:
        guard = state.guard
        if scaled != (train.precision == "fp16"):
            scale = jnp.full_like(guard.loss_scale, FIRST_LOSS_SCALE if train.precision == "fp16" else 1.0)
            guard = guard._replace(loss_scale=scale, since_growth=jnp.zeros_like(guard.since_growth))
        if other_losses:
            forgotten = ("loss_mean", "loss_variance", "losses", "skipped_in_row")
            guard = guard._replace(**{name: jnp.zeros_like(getattr(guard, name)) for name in forgotten})
        return state._replace(rng=jnp.asarray(key), guard=guard)

    return jax.jit(renewed, donate_argnums=0, out_shardings=training.compiled.shardings)(state)
