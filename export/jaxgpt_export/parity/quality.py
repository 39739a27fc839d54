"""What a change of a model costs: loss and distance from a reference on identical tokens."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxgpt.shared.errors import UserError
from torch import Tensor

from jaxgpt_export.parity.metrics import Parity, ParityMeter, Scores, differences, pieces

Int32Array = npt.NDArray[np.int32]
Float64Array = npt.NDArray[np.float64]
# Gives the logits (B, T, V) of tokens (B, T).
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Changes:
    """What changed at each position against the reference, the windows one after the other.

    Attributes:
      kl: (N,), KL(reference || model), nats.
      probability: (N,), probability of the right token, the model's less the reference's.
      same_top: (N,), whether both have the same most probable token.
    """

    kl: Float64Array
    probability: Float64Array
    same_top: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model on a text.

    Attributes:
      loss: cross entropy, nats per token.
      tokens: number of tokens predicted.
      parity: distance from the reference; None for the reference itself.
      parent: distance from its own parent, where one was named.
      window_losses: cross entropy of each window, nats, summed over its tokens.
      window_tokens: tokens predicted in each window.
      changes: against the reference; None for the reference itself.
    """

    loss: float
    tokens: int
    parity: Parity | None
    parent: Parity | None
    window_losses: tuple[float, ...]
    window_tokens: tuple[int, ...]
    changes: Changes | None = dataclasses.field(default=None, compare=False)


def difference_error(model: Quality, reference: Quality) -> float | None:
    """Return the standard error of model.loss - reference.loss over windows; None for fewer than two.

    Both were measured on the same windows and the difference is taken in each, so what makes a window hard
    for both drops out.
    """
    return ratio_error(np.subtract(model.window_losses, reference.window_losses), model.window_tokens)


def ratio_error(sums: Float64Array, window_tokens: Sequence[int]) -> float | None:
    """Return the standard error of a mean over tokens whose unit is the window; None for fewer than two.

    Tokens of one window depend on each other, windows hardly do. With s_w the sum over window w, n_w its
    tokens and d = sum s / sum n: sqrt(W / (W - 1) sum (s_w - d n_w)^2) / sum n.

    Args:
      sums: (W,), of a quantity over each window's tokens.
      window_tokens: (W,).

    Source: Cochran 1977, Sampling Techniques, the ratio estimator.
    """
    tokens = np.array(window_tokens, np.float64)
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    if len(tokens) < 2:
        return None
    residuals = sums - sums.sum() / tokens.sum() * tokens
    return math.sqrt(len(tokens) / (len(tokens) - 1) * float((residuals**2).sum())) / float(tokens.sum())


def batches(inputs: Int32Array, targets: Int32Array, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows (see `tokens.windows`) as tensors, so many rows at a time."""
    for start in range(0, len(inputs), rows):
        part = slice(start, start + rows)
        yield torch.from_numpy(inputs[part]).long(), torch.from_numpy(targets[part]).long()


@torch.inference_mode()
def measure_quality(
    models: dict[str, Forward],
    windows: Iterable[tuple[Tensor, Tensor]],
    parents: Mapping[str, str] | None = None,
    left_out: MutableMapping[str, str] | None = None,
) -> dict[str, Quality]:
    """Measure several models on identical tokens; the first is the reference.

    Args:
      models: by name.
      windows: pairs of tokens (B, T) and targets (B, T), targets -1 where nothing is predicted.
      parents: of some models the one, named before it, from which its distance is measured too.
      left_out: takes the models that fail, with why, and the others are measured to their end. Where it is
        None, or the model is the reference or a parent, its failure is that of all.

    Returns:
      The quality of each model that did not fail, under its name.

    Raises:
      UserError: a model fails, or its logits hold NaN or infinity; see `left_out`.
    """
    parents = parents or {}
    reference = next(iter(models))
    needed = {reference, *parents.values()}  # others are compared with them
    gathered = {name: _Gathered() for name in models}
    counts: list[int] = []
    for tokens, targets in windows:
        counted = targets >= 0
        counts += counted.sum(dim=1).tolist()
        if not counted.any():  # of the data set's windows, one may hold no answer
            for each in gathered.values():
                each.losses += [0.0] * len(targets)
            continue
        kept: dict[str, Tensor] = {}
        for name in list(gathered):
            try:
                logits = models[name](tokens)
                compared = None if name == reference else kept[reference]
                gathered[name].add(
                    targets, logits, compared, kept[parents[name]] if name in parents else None
                )
            except UserError as error:
                if left_out is None or name in needed:
                    raise
                left_out[name] = str(error)
                del gathered[name]
                continue
            if name in needed:
                kept[name] = logits
    return {
        name: found.quality(counts, name != reference, name in parents) for name, found in gathered.items()
    }


class _Gathered:
    """What one model gives, over several batches of windows."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # of each window
        self._meter, self._parent_meter = ParityMeter(), ParityMeter()
        self._changes: list[Changes] = []

    def add(self, targets: Tensor, logits: Tensor, reference: Tensor | None, parent: Tensor | None) -> None:
        """Take the logits (B, T, V) of targets (B, T), of which some predict something.

        Args:
          targets: -1 where nothing is predicted.
          logits: float64 copies are made of some positions at a time.
          reference: logits to compare with; None where nothing is compared.
          parent: the same.

        Raises:
          UserError: logits that count hold NaN or infinity.
        """
        where = (targets.flatten() >= 0).nonzero().flatten()
        wanted = targets.flatten()[where]
        losses, reference_losses, changed, parent_changed = [], [], [], []

        def scores_of(logits: Tensor, piece: slice) -> Scores:
            return Scores(logits.flatten(0, 1)[where[piece]])

        for piece in pieces(len(where)):
            scores = scores_of(logits, piece)
            losses.append(scores.losses(wanted[piece]))
            if reference is not None:
                theirs = scores_of(reference, piece)
                reference_losses.append(theirs.losses(wanted[piece]))
                changed.append(differences(theirs, scores))
            if parent is not None:
                parent_changed.append(differences(scores_of(parent, piece), scores))
        right = torch.cat(losses)
        found = torch.zeros(targets.numel(), dtype=torch.float64)
        found[where] = right
        self.losses += found.reshape(targets.shape).sum(dim=1).tolist()
        if reference is not None:
            kl, same_top = self._meter.add_differences(changed)
            change = (-right).exp() - (-torch.cat(reference_losses)).exp()
            self._changes.append(Changes(kl.numpy(), change.numpy(), same_top.numpy()))
        if parent is not None:
            self._parent_meter.add_differences(parent_changed)

    def quality(self, counts: Sequence[int], is_compared: bool, has_parent: bool) -> Quality:
        """Return what was gathered over windows that predict so many tokens."""
        return Quality(
            loss=math.fsum(self.losses) / sum(counts),
            tokens=sum(counts),
            parity=self._meter.result() if is_compared else None,
            parent=self._parent_meter.result() if has_parent else None,
            window_losses=tuple(self.losses),
            window_tokens=tuple(counts),
            changes=_joined(self._changes) if is_compared else None,
        )


def _joined(parts: Sequence[Changes]) -> Changes:
    return Changes(
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )
