"""Assertions for tests: they pass, or say by how much a model is off and which layer is to blame."""

from jaxtyping import Integer
from torch import Tensor

from jaxgpt_export.parity.comparable import Comparable
from jaxgpt_export.parity.comparison import Comparison, compare_models
from jaxgpt_export.parity.layers import first_deviation, layer_errors

BLAMED_ROWS = 2  # rows of tokens on which layers are compared after a failure


def assert_logits_close(
    reference: Comparable, model: Comparable, tokens: Integer[Tensor, "B T"], max_abs: float = 1e-4
) -> Comparison:
    """Assert that no logit differs by more than max_abs.

    Args:
      reference: what is held to be right; see open_model.
      model: what is tested.
      tokens: (B, T), real text.
      max_abs: 1e-4 suits float32 against float32: sums in another order give 1e-6 to 2e-5.

    Raises:
      AssertionError: names the difference, the first layer that deviates and its tensor.
    """
    found = compare_models(reference, model, tokens)
    largest = found.parity.max_abs_logit_diff
    if not largest <= max_abs:
        raise AssertionError(
            f"logits of {model.name} differ from {reference.name} by up to {largest:.3g}, at most "
            f"{max_abs:.3g} is allowed; {_blame(reference, model, tokens)}"
        )
    return found


def assert_quantization_loss(
    reference: Comparable,
    model: Comparable,
    tokens: Integer[Tensor, "B T"],
    max_increase: float = 0.003,
    max_kl: float | None = None,
) -> Comparison:
    """Assert that rounding costs no more than so much loss.

    Args:
      reference: the float model; see open_model.
      model: the quantized one.
      tokens: (B, T), held-out text, some thousands of tokens.
      max_increase: nats per token.
      max_kl: mean KL from the reference, nats; None for no bound.

    Raises:
      AssertionError: names the increase, and the first layer that deviates by more than rounding does, with
        its tensor, if there is one.
    """
    found = compare_models(reference, model, tokens)
    too_much = not found.loss_increase <= max_increase
    too_far = max_kl is not None and not found.parity.kl_mean <= max_kl
    if too_much or too_far:
        bound = f"at most {max_increase:.4g} nats" + (f" and KL {max_kl:.3g}" if max_kl is not None else "")
        raise AssertionError(
            f"{model.name} loses {found.loss_increase:+.4g} nats a token against {reference.name} (KL "
            f"{found.parity.kl_mean:.3g}), {bound} is allowed; {_blame(reference, model, tokens)}"
        )
    return found


def _blame(reference: Comparable, model: Comparable, tokens: Tensor) -> str:
    few = tokens[:BLAMED_ROWS]
    if not layer_errors(reference, model, few):
        return "no layer has GPT-2's name in both, so none can be named"
    deviation = first_deviation(reference, model, few)
    return str(deviation) if deviation else "no single layer deviates: the error is spread over all"
