"""Rows of `jaxgpt-bench recipe`: what each changes, the trials that AdamW and Muon were tuned by, shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxgpt_bench.recipe.runs import Run

# Model and batch; the vocabulary is the data's.
SHAPES: dict[str, dict[str, int]] = {
    "1m": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8},
    "6m": {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 512, "batch_size": 8},
}
SINGLE_STEPS = 200  # of a row that changes one thing: half of AdamW's longest
TRIAL_SEED = 100  # none of those that are reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
      settings: of TrainConfig.
      warmup_share: of the steps.
      momentum_warmup_share: of the steps.
      lengths: numbers of steps.
      average_last: share of the steps whose weights are averaged at the end; 0 takes the last weights.
      newton_schulz: precision of Muon's products alone.
    """

    settings: Mapping[str, Any]
    warmup_share: float = 0.1
    momentum_warmup_share: float = 0.0
    lengths: tuple[int, ...] = (SINGLE_STEPS,)
    average_last: float = 0.0
    newton_schulz: str = "fp32"


LINEAR: dict[str, Any] = {"lr_schedule": "linear", "final_lr_fraction": 0.0, "weight_decay": 0.1}
ADAMW = {
    "optimizer": "adamw", "learning_rate": 0.002, "embedding_learning_rate": 0.032, "beta1": 0.6, **LINEAR,
}  # fmt: skip
ADAMW_WARMUP_SHARE = 0.4
MUON = {"optimizer": "muon", "learning_rate": 0.02, "embedding_learning_rate": 0.04, **LINEAR}
WINNER = {
    **MUON, "embedding_learning_rate": 0.02, "beta1": 0.6, "momentum": 0.9, "split_qkv": True,
    "decay_fraction": 0.65,
}  # fmt: skip


def _changed(**settings: Any) -> Row:
    """Return a row that is Muon's but for what is given."""
    return Row(settings={**MUON, **settings})


def _adamw(rate: float, embeddings: float, warmup_share: float, beta1: float) -> dict[str, Any]:
    """Return what a trial of AdamW changes."""
    rates = {"learning_rate": rate, "embedding_learning_rate": embeddings}
    return {**rates, "warmup_share": warmup_share, "beta1": beta1}


ROWS: dict[str, dict[str, Row]] = {
    "1m": {
        "adamw": Row(settings=ADAMW, warmup_share=ADAMW_WARMUP_SHARE, lengths=(200, 280, 400)),
        "muon": Row(settings=MUON, lengths=(140, 200, 280)),
        "split-qkv": _changed(split_qkv=True),
        "newton-schulz-bf16": Row(settings=MUON, newton_schulz="bf16"),
        "betas": _changed(beta1=0.6),
        "late-decay": _changed(decay_fraction=0.65),
        "momentum-warmup": Row(settings=MUON, momentum_warmup_share=0.5),
        "average": Row(settings=MUON, average_last=0.1),
        "winner": Row(settings=WINNER, momentum_warmup_share=0.5, lengths=(140, 200, 280)),
    },
    "6m": {
        "adamw": Row(settings=ADAMW, warmup_share=ADAMW_WARMUP_SHARE, lengths=(400,)),
        "muon": Row(settings=MUON, lengths=(200, 280)),
        "winner": Row(settings=WINNER, momentum_warmup_share=0.5, lengths=(160, 200, 280)),
    },
}

# What was tried before the table was measured, one after the other, with TRIAL_SEED: steps, then what differs
# from the row. The best stand above.
TRIALS: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {
    "adamw": (
        *((400, _adamw(rate, embeddings, 0.05, 0.9)) for rate, embeddings in (
            (0.004, 0.004), (0.008, 0.008), (0.002, 0.002), (0.016, 0.016), (0.002, 0.008), (0.004, 0.008),
            (0.002, 0.016), (0.001, 0.008), (0.002, 0.032), (0.001, 0.032),
        )),
        (400, _adamw(0.003, 0.016, 0.2, 0.9)), (400, _adamw(0.002, 0.032, 0.2, 0.9)),
        (400, _adamw(0.003, 0.032, 0.3, 0.9)), (400, _adamw(0.002, 0.032, 0.4, 0.9)),
        (400, _adamw(0.002, 0.032, 0.5, 0.9)), (400, _adamw(0.003, 0.032, 0.3, 0.8)),
        (400, _adamw(0.003, 0.032, 0.4, 0.8)), (400, _adamw(0.002, 0.032, 0.4, 0.6)),
        (400, _adamw(0.002, 0.016, 0.4, 0.6)),
    ),
    "muon": (
        *((280, {"learning_rate": rate, "embedding_learning_rate": 0.02, "warmup_share": 1 / 14})
          for rate in (0.01, 0.02, 0.04)),
        *((200, {"embedding_learning_rate": rate}) for rate in (0.01, 0.02, 0.04, 0.08)),
        (200, {"learning_rate": 0.03, "embedding_learning_rate": 0.02}),
        (200, {"weight_decay": 0.3}), (200, {"warmup_share": 0.25}), (200, {"beta1": 0.6}),
        (200, {"learning_rate": 0.03, "warmup_share": 0.25}), (200, {"split_qkv": True}),
    ),
    "winner": (
        (200, {"momentum": 0.95}), (200, {"momentum": 0.95, "embedding_learning_rate": 0.04}),
        (200, {"momentum": 0.95, "embedding_learning_rate": 0.08}),
        (200, {"momentum": 0.95, "embedding_learning_rate": 0.04, "learning_rate": 0.03}),
        (200, {"embedding_learning_rate": 0.04}),
    ),
}  # fmt: skip


def runs_of(name: str, shape: str, seed: int, lengths: tuple[int, ...] = ()) -> list[Run]:
    """Return the trainings of a row with a seed: one a length, the row's own if none is given."""
    row = ROWS[shape][name]
    return [_run(name, row, shape, steps, seed) for steps in lengths or row.lengths]


def is_current(run: Run) -> bool:
    """Whether a training is one that its row gives now; of a row that is gone, any is."""
    if run.row not in ROWS.get(run.shape, {}):
        return True
    (now,) = runs_of(run.row, run.shape, run.seed, (run.steps,))
    return run.key == now.key


def trial_runs(name: str, shape: str) -> list[Run]:
    """Return the trainings that a row was tuned by."""
    row, found = ROWS[shape][name], []
    for steps, changes in TRIALS[name]:
        settings = {**row.settings, **changes}
        share = settings.pop("warmup_share", row.warmup_share)
        tried = dataclasses.replace(row, settings=settings, warmup_share=share)
        found.append(_run(f"{name}-trials", tried, shape, steps, TRIAL_SEED))
    return found


def _run(name: str, row: Row, shape: str, steps: int, seed: int) -> Run:
    """Return a training of a row, with warm-ups as long as its shares say."""
    settings = {**row.settings, "warmup_steps": round(row.warmup_share * steps)}
    if row.momentum_warmup_share:
        settings["momentum_warmup_steps"] = round(row.momentum_warmup_share * steps)
    return Run(
        row=name,
        shape=shape,
        steps=steps,
        seed=seed,
        settings=settings,
        average_last=row.average_last,
        newton_schulz=row.newton_schulz,
    )
