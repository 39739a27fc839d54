import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.generation.sampling import Sampler, Sampling
from jaxgpt.shared.errors import UserError

LOGITS = np.array([0.0, 2.0, 1.0, -1.0, 2.0, 0.5], np.float32)


def shares(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.draw(LOGITS) for _ in range(draws)], minlength=6) / draws


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling(temperature=0.0)).draw(LOGITS) == 1


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    # 20,000 draws: a share's standard deviation is at most 0.0036; four of them.
    assert np.abs(shares(Sampling(temperature=0.7)) - softmax(LOGITS / 0.7)).max() < 0.0145


def test_top_k_keeps_the_k_most_probable() -> None:
    p = softmax(LOGITS)
    p[[0, 3, 5]] = 0
    assert np.abs(shares(Sampling(temperature=1.0, top_k=3)) - p / p.sum()).max() < 0.0145


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.7, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    p = softmax(LOGITS)
    order = np.argsort(-p, kind="stable")
    size = next(n for n in range(1, 7) if p[order[:n]].sum() >= top_p)
    kept = set(order[:size].tolist())
    drawn = set(np.flatnonzero(shares(Sampling(temperature=1.0, top_p=top_p))).tolist())
    assert drawn == kept


def test_same_seed_same_draws_other_seed_other_draws() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.draw(LOGITS) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": -(10**5000)},  # of more digits than Python writes out
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -(10**5000)},
    ],
)
def test_impossible_settings_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


@pytest.mark.parametrize("temperature", [1e-2, 1e-300, 1e-308, 1e-310, 5e-324])
def test_a_temperature_near_0_takes_one_of_the_largest(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    assert {sampler.draw(LOGITS) for _ in range(50)} == {1, 4}


def test_whole_numbers_that_no_float_holds_are_refused_or_draw() -> None:
    # In a process of its own: where shapes are checked, types are too, and no whole number is a float.
    program = """
import numpy, sys
from jaxgpt.generation.sampling import Sampler, Sampling
from jaxgpt.shared.errors import UserError
logits = numpy.array([0.0, 2.0], numpy.float32)
for name in ("temperature", "top_p", "min_p"):
    for value in (10**400, -(10**400), 10**5000):
        try:
            print(Sampler(Sampling(**{name: value})).draw(logits))
        except UserError as error:
            assert str(error).startswith(name), error
Sampler(Sampling(temperature=int(sys.float_info.max), top_k=10**400, seed=10**400)).draw(logits)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    for temperature in (0.0, 0.8):
        with pytest.raises(UserError, match="NaN or infinity"):
            Sampler(Sampling(temperature=temperature)).draw(np.array([1.0, value, 0.0], np.float32))
