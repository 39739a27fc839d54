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
      lengths: numbers of steps.
      average_last: share of the steps whose weights are averaged at the end; 0 takes the last weights.
      newton_schulz: precision of Muon's products alone.
    """

    settings: Mapping[str, Any]
    warmup_share: float = 0.1
    lengths: tuple[int, ...] = (SINGLE_STEPS,)
    average_last: float = 0.0
    newton_schulz: str = "fp32"


LINEAR: dict[str, Any] = {"lr_schedule": "linear", "final_lr_fraction": 0.0, "weight_decay": 0.1}
ADAMW = {"optimizer": "adamw", "learning_rate": 0.003, "embedding_learning_rate": 0.032, **LINEAR}
ADAMW_WARMUP_SHARE = 0.3
MUON = {"optimizer": "muon", "learning_rate": 0.02, "embedding_learning_rate": 0.04, **LINEAR}
WINNER = {**MUON, "split_qkv": True}


def _changed(**settings: Any) -> Row:
    """Return a row that is Muon's but for what is given."""
    return Row(settings={**MUON, **settings})


ROWS: dict[str, dict[str, Row]] = {
    "1m": {
        "adamw": Row(settings=ADAMW, warmup_share=ADAMW_WARMUP_SHARE, lengths=(200, 280, 400)),
        "muon": Row(settings=MUON, lengths=(140, 200, 280)),
        "split-qkv": _changed(split_qkv=True),
        "newton-schulz-bf16": Row(settings=MUON, newton_schulz="bf16"),
        "betas": _changed(beta1=0.6),
        "vector-rate": _changed(vector_learning_rate=0.005),
        "late-decay": _changed(decay_fraction=0.65),
        "momentum-warmup": _changed(momentum_warmup_steps=100),
        "average": Row(settings=MUON, average_last=0.1),
        "winner": Row(settings=WINNER, lengths=(140, 200, 280)),
    },
    "6m": {
        "adamw": Row(settings=ADAMW, warmup_share=ADAMW_WARMUP_SHARE, lengths=(160,)),
        "muon": Row(settings=MUON, lengths=(160,)),
        "winner": Row(settings=WINNER, lengths=(160,)),
    },
}

# Settings tried before the table was measured, one after the other, with TRIAL_SEED; the best stand above.
TRIAL_STEPS = {"adamw": 400, "muon": 200}
# Name: learning rate, that of embeddings, share of the steps for warm-up.
TRIALS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "adamw": (
        (0.004, 0.004, 0.05), (0.008, 0.008, 0.05), (0.002, 0.002, 0.05), (0.016, 0.016, 0.05),
        (0.002, 0.008, 0.05), (0.004, 0.008, 0.05), (0.002, 0.016, 0.05), (0.001, 0.008, 0.05),
        (0.002, 0.032, 0.05), (0.001, 0.032, 0.05), (0.003, 0.016, 0.2), (0.002, 0.032, 0.2),
        (0.003, 0.032, 0.3), (0.002, 0.032, 0.4),
    ),
    "muon": (
        (0.02, 0.02, 0.1), (0.03, 0.02, 0.1), (0.02, 0.01, 0.1), (0.02, 0.04, 0.1), (0.02, 0.08, 0.1),
        (0.02, 0.04, 0.25), (0.03, 0.04, 0.25),
    ),
}  # fmt: skip


def runs_of(name: str, shape: str, seed: int, lengths: tuple[int, ...] = ()) -> list[Run]:
    """Return the trainings of a row with a seed: one a length, the row's own if none is given."""
    row = ROWS[shape][name]
    return [
        Run(
            row=name,
            shape=shape,
            steps=steps,
            seed=seed,
            settings={**row.settings, "warmup_steps": round(row.warmup_share * steps)},
            average_last=row.average_last,
            newton_schulz=row.newton_schulz,
        )
        for steps in lengths or row.lengths
    ]


def trial_runs(name: str, shape: str) -> list[Run]:
    """Return the trainings that a row was tuned by."""
    steps = TRIAL_STEPS[name]
    found = []
    for rate, embedding_rate, warmup_share in TRIALS[name]:
        settings = {**ROWS[shape][name].settings, "learning_rate": rate}
        settings["embedding_learning_rate"] = embedding_rate
        settings["warmup_steps"] = round(warmup_share * steps)
        found.append(Run(row=f"{name}-trials", shape=shape, steps=steps, seed=TRIAL_SEED, settings=settings))
    return found
