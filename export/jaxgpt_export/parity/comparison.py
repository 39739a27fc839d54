"""Two models on the same tokens: as a whole, and layer by layer."""

import dataclasses

import torch
from jaxgpt.shared.errors import UserError
from jaxtyping import Bool, Integer
from torch import Tensor

from jaxgpt_export.parity.comparable import Comparable
from jaxgpt_export.parity.metrics import Parity, ParityMeter, token_losses


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same tokens.

    Attributes:
      parity: distance of the logits.
      reference_loss: nats per token.
      loss: nats per token.
      greedy_parts_at: first generated token at which the greedy texts differ; None when none does.
      greedy_tokens: how many were generated.
    """

    parity: Parity
    reference_loss: float
    loss: float
    greedy_parts_at: int | None
    greedy_tokens: int

    @property
    def loss_increase(self) -> float:
        """Loss above the reference's, nats per token."""
        return self.loss - self.reference_loss


def compare_models(
    reference: Comparable,
    model: Comparable,
    tokens: Integer[Tensor, "B T"],
    greedy_tokens: int = 0,
    counted: Bool[Tensor, "B T"] | None = None,
) -> Comparison:
    """Compare two models on tokens; every position but the last predicts the next token.

    Args:
      reference: what is held to be right.
      model: what is compared with it.
      tokens: (B, T), T > 1.
      greedy_tokens: also continue the first half of each row greedily with both, by so many tokens.
      counted: of which positions the losses count the prediction, as `Dataset.val_windows` has it; all.

    Raises:
      UserError: the vocabularies differ, or logits are not finite.
    """
    for each in (reference, model):
        if each.block_size is not None and tokens.shape[1] > each.block_size:
            raise UserError(f"{tokens.shape[1]} tokens a row were given, {each.name} holds {each.block_size}")
    meter, losses = ParityMeter(), [0.0, 0.0]  # of the reference, of the model
    wanted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    count = max(int(wanted[:, :-1].sum()), 1)
    # One row at a time: float64 copies of all logits would take gigabytes.
    for row, kept in zip(tokens, wanted[:, :-1], strict=True):
        expected, found = reference.logits(row[None])[0], model.logits(row[None])[0]
        if expected.shape != found.shape:
            raise UserError(
                f"{reference.name} gives logits {tuple(expected.shape)}, {model.name} {tuple(found.shape)}: "
                "they have different vocabularies"
            )
        meter.add(expected, found)
        for index, logits in enumerate((expected, found)):
            losses[index] += float(token_losses(logits[:-1], row[1:])[kept].sum()) / count
    parts_at = first_divergence(reference, model, tokens, greedy_tokens) if greedy_tokens else None
    return Comparison(meter.result(), losses[0], losses[1], parts_at, greedy_tokens)


def first_divergence(
    reference: Comparable, model: Comparable, tokens: Integer[Tensor, "B T"], count: int
) -> int | None:
    """Continue the first half of each row greedily; return the first token at which any two rows differ."""
    start = max(tokens.shape[1] // 2, 1)
    texts = tokens[:, :start]
    for place in range(count):
        room = texts[:, -tokens.shape[1] :]
        theirs, ours = reference.logits(room)[:, -1].argmax(-1), model.logits(room)[:, -1].argmax(-1)
        if not torch.equal(theirs, ours):
            return place
        texts = torch.cat([texts, theirs[:, None].to(texts.dtype)], dim=1)
    return None
