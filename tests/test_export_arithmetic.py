import numpy as np
import pytest
import torch
from jaxgpt_export.model.arithmetic import (
    LEVELS,
    MIN_SCALE,
    quantize_rows,
    quantize_static,
    quantize_tokens,
    scale_of,
)


def definition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The docstring's formula in numpy float32, row by row."""
    scale = np.maximum(np.abs(x).max(axis=1) / np.float32(127), np.float32(2.0**-126))
    return np.rint(x / scale[:, None]).astype(np.int64), scale


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-3, 1.0, 1e30])
def test_rows_and_tokens_follow_the_definition_at_every_magnitude(size: float) -> None:
    x = (np.random.default_rng(0).normal(size=(50, 33)) * size).astype(np.float32)
    x[7] = 0
    expected, scale = definition(x)
    for q, s in (quantize_rows(torch.from_numpy(x)), quantize_tokens(torch.from_numpy(x))):
        assert (q.numpy() == expected).all()
        assert (s.flatten().numpy() == scale).all()
    assert np.abs(expected).max() <= 127
    assert (expected[7] == 0).all()


def test_rounding_error_is_at_most_half_a_scale() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_rows(x)
    # half a scale, and a float32 rounding of a quotient of up to 127
    assert float(((q * scale[:, None] - x).abs() / scale[:, None]).max()) <= 0.5 + 127 * 2**-23


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_largest_value_never_needs_clipping() -> None:
    largest = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, 200_000).astype(np.float32))
    assert float((largest / scale_of(largest)).round().max()) == 127.0


def test_static_input_is_clipped_and_never_minus_128() -> None:
    x = torch.tensor([[1e9, -1e9, 12.7, -12.85, 0.05]])
    assert quantize_static(x, torch.tensor(0.1)).tolist() == [[127, -127, 127, -127, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_row_that_is_not_finite_is_named(bad: float) -> None:
    weight = torch.ones(5, 4)
    weight[3, 2] = bad
    with pytest.raises(ValueError, match="weight row 3 of 5 holds NaN or infinity"):
        quantize_rows(weight)


def test_sums_of_the_widest_gpt2_fit_int32() -> None:
    assert LEVELS**2 * 4 * 1600 < 2**31  # gpt2-xl's mlp.c_proj
    assert np.finfo(np.float32).smallest_normal == MIN_SCALE
