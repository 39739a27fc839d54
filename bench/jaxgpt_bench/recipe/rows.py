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
      lengths: numbers of steps.
      average_last: share of the steps whose weights are averaged at the end; 0 takes the last weights.
      newton_schulz: precision of Muon's products alone.
    """

    settings: Mapping[str, Any]
    lengths: tuple[int, ...] = (SINGLE_STEPS,)
    average_last: float = 0.0
    newton_schulz: str = "fp32"


LINEAR: dict[str, Any] = {
    "lr_schedule": "linear", "final_lr_fraction": 0.0, "warmup_steps": 20, "weight_decay": 0.1,
}  # fmt: skip
ADAMW = {"optimizer": "adamw", "learning_rate": 4e-3, "embedding_learning_rate": 4e-3, **LINEAR}
MUON = {"optimizer": "muon", "learning_rate": 0.02, "embedding_learning_rate": 0.02, **LINEAR}

WINNER = {**MUON, "split_qkv": True}


def _changed(**settings: Any) -> Row:
    """Return a row that is Muon's but for what is given."""
    return Row(settings={**MUON, **settings})


ROWS: dict[str, dict[str, Row]] = {
    "1m": {
        "adamw": Row(settings=ADAMW, lengths=(200, 280, 400)),
        "muon": Row(settings=MUON, lengths=(140, 200, 280)),
        "split-qkv": _changed(split_qkv=True),
        "newton-schulz-bf16": Row(settings=MUON, newton_schulz="bf16"),
        "betas": _changed(beta1=0.8, beta2=0.95),
        "vector-rate": _changed(vector_learning_rate=0.005),
        "late-decay": _changed(decay_fraction=0.65),
        "cautious-decay": _changed(cautious_weight_decay=True),
        "momentum-warmup": _changed(momentum_warmup_steps=100),
        "zero-projections": _changed(zero_projections=True),
        "document-windows": _changed(document_windows=True),
        "average": Row(settings=MUON, average_last=0.1),
        "winner": Row(settings=WINNER, lengths=(140, 200, 280)),
    },
    "6m": {
        "adamw": Row(settings=ADAMW, lengths=(160,)),
        "muon": Row(settings=MUON, lengths=(160,)),
        "winner": Row(settings=WINNER, lengths=(160,)),
    },
}

# Settings tried with TRIAL_SEED before the table was measured, with the number of steps; the best stands above.
TRIALS: dict[str, tuple[int, tuple[dict[str, Any], ...]]] = {}


def runs_of(name: str, shape: str, seed: int, lengths: tuple[int, ...] = ()) -> list[Run]:
    """Return the trainings of a row with a seed: one a length, the row's own if none is given."""
    row = ROWS[shape][name]
    return [
        Run(
            row=name,
            shape=shape,
            steps=steps,
            seed=seed,
            settings=dict(row.settings),
            average_last=row.average_last,
            newton_schulz=row.newton_schulz,
        )
        for steps in lengths or row.lengths
    ]


def trial_runs(name: str, shape: str) -> list[Run]:
    """Return the trainings that a row was tuned by."""
    steps, tried = TRIALS[name]
    base = ROWS[shape][name].settings
    return [
        Run(row=f"{name}-trials", shape=shape, steps=steps, seed=TRIAL_SEED, settings={**base, **changes})
        for changes in tried
    ]
