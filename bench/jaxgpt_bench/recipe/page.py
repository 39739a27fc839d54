"""The tables of docs/training.md: steps and cpu-seconds to a loss, a row a change of the recipe."""

from collections.abc import Sequence

from jaxgpt_bench.common.tables import Column, table
from jaxgpt_bench.recipe.figures import BASE, REFERENCE, RecipeRow, loss_text, with_error

ABOUT = {
    REFERENCE: "AdamW, tuned",
    BASE: "Muon",
    "betas": "+ AdamW beside it with `beta1` 0.6 in place of 0.9",
    "momentum-warmup": "+ `momentum_warmup_steps`: momentum rises from 0.85",
    "late-decay": "+ `decay_fraction` 0.65",
    "split-qkv": "+ `split_qkv`",
    "newton-schulz-bf16": "Newton-Schulz in bfloat16",
    "average": "average of the weights of the last tenth of the steps",
    "winner": "`winner`: the four marked + at 1 million parameters, embeddings at 0.02, momentum to 0.9",
}
# Tried on another machine, whose seconds say nothing beside the others', and taken out again.
RETIRED = {
    "cautious-decay": "cautious weight decay (taken out again)",
    "zero-projections": "residual projections that begin at zero (taken out again)",
    "document-windows": "windows that begin with a document (taken out again)",
}
# As on the terminal.
AGAINST_MUON = Column[RecipeRow]("minus Muon's", lambda row: with_error(row.against_muon, 4, "+"))
STEPS_TO_TARGET = Column[RecipeRow](
    "steps to the target", lambda row: with_error(row.steps_to_target, 0) + " (beyond)" * row.extrapolated
)
SHARE_OF_ADAMW = Column[RecipeRow](
    "of AdamW's", lambda row: "" if row.share_of_adamw is None else f"{row.share_of_adamw:.2f}"
)
COLUMNS = (
    Column[RecipeRow]("recipe", lambda row: {**ABOUT, **RETIRED}.get(row.name, row.name)),
    Column[RecipeRow]("seeds", lambda row: str(row.seeds)),
    Column[RecipeRow]("loss", lambda row: f"{loss_text(row)} at {row.steps}"),
    *(AGAINST_MUON, STEPS_TO_TARGET, SHARE_OF_ADAMW),
    Column[RecipeRow]("cpu-seconds", lambda row: _seconds(row)),
)


def _seconds(row: RecipeRow) -> str:
    known = row.cpu_seconds_to_target is not None and row.name not in RETIRED
    return f"{row.cpu_seconds_to_target:.0f}" if known else ""


def markdown_block(rows: Sequence[RecipeRow]) -> str:
    """Return the table of a shape."""
    return table(COLUMNS, rows).markdown()
