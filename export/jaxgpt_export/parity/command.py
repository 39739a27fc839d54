"""`jaxgpt-export compare`: one model against another, as a whole and layer by layer.

jaxgpt-export compare --reference runs/demo/run --model runs/demo/int8-static --data runs/demo/data
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from jaxgpt_export.parity.comparable import Comparable
    from jaxgpt_export.parity.comparison import Comparison

LAYER_ROWS = 2  # windows on which layers are compared
DEFAULT_BLOCK_SIZE = 64  # where no model says what it holds
TRAINED_METHODS = ("int8-static-qat", "static-qat")  # as earlier versions wrote it


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Compare a model with a reference; exit code 1 when a bound that was given is passed.

    What was made of a quantization-aware training must round to the training's integers, too.

    Attributes:
      reference: run folder (computed by Flax), artifact, or Hugging Face GPT-2 folder (by transformers).
      model: another one.
      data: dataset folder whose validation split is compared on.
      tokens: of it to compare on.
      block_size: window length; if not given, what both models hold.
      greedy_tokens: also continue two texts greedily by so many tokens and say where they part.
      max_logit_diff: bound on the largest difference of a logit.
      max_loss_increase: bound on the loss above the reference's, nats per token.
      json: print one JSON document with all figures on stdout.
    """

    reference: Path
    model: Path
    data: Path
    tokens: int = 4096
    block_size: int | None = None
    greedy_tokens: int = 0
    max_logit_diff: float | None = None
    max_loss_increase: float | None = None
    json: bool = False


def compare_command(options: CompareOptions) -> Result:
    """Run `jaxgpt-export compare`."""
    import torch
    from jaxgpt.shared.dataset import open_dataset

    from jaxgpt_export.parity.comparison import compare_models
    from jaxgpt_export.parity.models import open_model, require_tokenizer

    _check(options)
    dataset = open_dataset(options.data)
    require_tokenizer(dataset, options.reference, options.model)
    is_trained = any(map(_is_made_of_training, (options.reference, options.model)))
    reference, model = open_model(options.reference), open_model(options.model)
    held = [each.block_size for each in (reference, model) if each.block_size is not None]
    block_size = min(held, default=DEFAULT_BLOCK_SIZE) if options.block_size is None else options.block_size
    full = (len(dataset.val) - 1) // block_size
    inputs, targets = dataset.val_windows(block_size, 0, min(max(options.tokens // block_size, 1), full))
    tokens, counted = torch.from_numpy(inputs), torch.from_numpy(targets >= 0)
    found = compare_models(reference, model, tokens, counted=counted)
    parity = found.parity
    say(
        f"{options.model} against {options.reference} on {tokens.numel():,} tokens: logits differ by up to "
        f"{parity.max_abs_logit_diff:.3g} (mean {parity.mean_abs_logit_diff:.3g}), KL {parity.kl_mean:.3g} "
        f"(max {parity.kl_max:.3g}), top-1 {parity.top1_agreement:.2%}, loss {found.loss:.4f} "
        f"({found.loss_increase:+.5f})"
    )
    figures: dict[str, Any] = {
        "tokens": tokens.numel(),
        "parity": dataclasses.asdict(parity),
        "reference_loss": found.reference_loss,
        "loss": found.loss,
        "loss_increase": found.loss_increase,
    }
    few = tokens[:LAYER_ROWS]
    figures["greedy_parts_at"] = _greedy_parts_at(reference, model, few, options.greedy_tokens)
    layers, gates = _compare_layers(reference, model, few, is_trained)
    gates |= _bounds(options, found)
    for text, passed in gates.items():
        say(f"{'pass' if passed else 'FAIL'}  {text}")
    return Result({**figures, **layers, "gates": gates}, passed=all(gates.values()))


def _check(options: CompareOptions) -> None:
    """Raise UserError for options that can't be meant."""
    asked = options.block_size
    if options.tokens < 2 or (asked is not None and asked < 2) or options.greedy_tokens < 0:
        raise UserError("--tokens and --block-size must be at least 2, --greedy-tokens 0 or more")
    for bound in (options.max_logit_diff, options.max_loss_increase):
        if bound is not None and not math.isfinite(bound):
            raise UserError(f"a bound ({bound}) must be a finite number")


def _greedy_parts_at(
    reference: "Comparable", model: "Comparable", tokens: "Tensor", count: int
) -> int | None:
    """Continue texts greedily and say where they part; nothing for a count of 0."""
    from jaxgpt_export.parity.comparison import first_divergence

    if not count:
        return None
    parts_at = first_divergence(reference, model, tokens, count)
    say(
        f"greedy texts of {count} tokens "
        + ("stay the same" if parts_at is None else f"part at token {parts_at}")
    )
    return parts_at


def _is_made_of_training(folder: Path) -> bool:
    """Whether an artifact rounds with the scales of a quantization-aware training."""
    path = folder / "certificate.json"
    return path.is_file() and read_json(path, "certificate").get("method") in TRAINED_METHODS


def _compare_layers(
    reference: "Comparable", model: "Comparable", tokens: "Tensor", is_trained: bool
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Compare layer by layer, integers too where both round; return the figures and the gates.

    What was made of a training has its integers. Others may well differ: nothing depends on those.
    """
    from jaxgpt_export.parity.integers import compare_integers
    from jaxgpt_export.parity.layers import first_deviation, layer_errors
    from jaxgpt_export.parity.module_model import ModuleModel

    errors = layer_errors(reference, model, tokens)
    for name, error in errors.items():
        say(f"  {name:<18} relative error {error:.2e}")
    deviation = first_deviation(reference, model, tokens)
    if deviation is not None:
        say(str(deviation))
    integers = compare_integers(reference, model, tokens)
    gates = {}
    if integers is not None:
        text = f"on {tokens.numel()} tokens, {integers}"
        if not is_trained or (isinstance(reference, ModuleModel) and isinstance(model, ModuleModel)):
            say(text)
        else:
            gates[text] = integers.passed
    figures = {
        "layer_errors": errors,
        "first_deviation": None if deviation is None else dataclasses.asdict(deviation),
        "integers": None if integers is None else dataclasses.asdict(integers),
    }
    return figures, gates


def _bounds(options: CompareOptions, found: "Comparison") -> dict[str, bool]:
    """Return the gates of the bounds that were given."""
    gates = {}
    if options.max_logit_diff is not None:
        largest = found.parity.max_abs_logit_diff
        text = f"largest logit difference {largest:.3g} <= {options.max_logit_diff:.3g}"
        gates[text] = largest <= options.max_logit_diff
    if options.max_loss_increase is not None:
        text = f"loss increase {found.loss_increase:+.5f} <= {options.max_loss_increase:g}"
        gates[text] = found.loss_increase <= options.max_loss_increase
    return gates
