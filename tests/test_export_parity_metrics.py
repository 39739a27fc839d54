"""The figures of parity beside their formulas, written out in numpy's float64."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from jaxgpt_export.parity.metrics import Parity, ParityMeter, Scores, compare
from jaxgpt_export.parity.quality import measure_quality

from jaxgpt.shared.errors import UserError

Logits = npt.NDArray[np.float64]
FLOAT64 = 1e-12  # relative; sums of 100 numbers in another order
FIGURES = ("max_abs_logit_diff", "mean_abs_logit_diff", "kl_mean", "kl_max", "top1_agreement")


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(p: Logits, q: Logits) -> Logits:
    """KL(P || Q) of each position, nats: the sum of P log(P / Q). P is what the first logits say."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def by_formula(reference: Logits, other: Logits) -> Parity:
    divergence = kl(reference, other)
    return Parity(
        max_abs_logit_diff=float(np.abs(reference - other).max()),
        mean_abs_logit_diff=float(np.abs(reference - other).mean()),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1_agreement=float((reference.argmax(axis=-1) == other.argmax(axis=-1)).mean()),
    )


def drawn(positions: int, vocabulary: int, noise: float, seed: int = 0) -> tuple[Logits, Logits]:
    """Return logits of size 3 and the same with noise, as float32 numbers."""
    draw = np.random.default_rng(seed)
    reference = 3 * draw.standard_normal((positions, vocabulary))
    other = reference + noise * draw.standard_normal((positions, vocabulary))
    return reference.astype(np.float32).astype(np.float64), other.astype(np.float32).astype(np.float64)


def float32(logits: Logits) -> torch.Tensor:
    return torch.from_numpy(logits.astype(np.float32))


@pytest.mark.parametrize("positions", [1, 2, 33])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 5.0])
def test_every_figure_is_its_formula_in_float64(positions: int, noise: float) -> None:
    reference, other = drawn(positions, 101, noise)
    found, expected = compare(float32(reference), float32(other)), by_formula(reference, other)
    for name in FIGURES:
        # KL of equal logits is a difference of numbers near 1: its error is absolute.
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=FLOAT64, abs=1e-14), name


def test_figures_of_batches_are_those_of_all_positions_at_once() -> None:
    """Batches of different sizes: a mean of means would be another number."""
    reference, other = drawn(40, 101, 0.5)
    meter = ParityMeter()
    for first, last in ((0, 1), (1, 4), (4, 37), (37, 40)):
        meter.add(float32(reference[first:last]), float32(other[first:last]))
    found, expected = meter.result(), by_formula(reference, other)
    for name in FIGURES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=FLOAT64), name


def test_kl_is_taken_from_the_reference_and_not_the_other_way_round() -> None:
    """P = (1/2, 1/2), Q = (0.99, 0.01): KL(P || Q) is 1.61 nats, KL(Q || P) 0.64."""
    p, q = np.log([[0.5, 0.5]]), np.log([[0.99, 0.01]])
    forward = 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)
    backward = 0.99 * math.log(0.99 / 0.5) + 0.01 * math.log(0.01 / 0.5)
    assert forward > 2.5 * backward
    found = compare(torch.from_numpy(p), torch.from_numpy(q))
    assert found.kl_mean == found.kl_max == pytest.approx(forward, rel=FLOAT64)
    turned = compare(torch.from_numpy(q), torch.from_numpy(p))
    assert turned.kl_mean == pytest.approx(backward, rel=FLOAT64)


def test_one_position_that_is_far_off_is_the_maximum_and_a_share_of_the_mean() -> None:
    """The largest KL lies in the first batch, the largest difference in the second: neither is forgotten."""
    equal = np.zeros((3, 2))
    first, second = equal.copy(), equal + 7.0  # a constant added to all logits leaves the distribution
    first[1] = [5.0, 0.0]
    meter = ParityMeter()
    meter.add(float32(equal), float32(first))
    meter.add(float32(equal), float32(second))
    found = meter.result()
    single = float(kl(equal[:1], first[1:2])[0])
    assert found.kl_max == pytest.approx(single, rel=FLOAT64)
    assert found.kl_mean == pytest.approx(single / 6, rel=FLOAT64)
    assert found.max_abs_logit_diff == 7.0
    assert found.mean_abs_logit_diff == (5.0 + 6 * 7.0) / 12


def test_adding_a_constant_to_all_logits_of_a_position_changes_no_probability() -> None:
    reference, other = drawn(9, 101, 0.3)
    shifts = 2.0 ** np.arange(9)[:, None]
    found = compare(torch.from_numpy(reference), torch.from_numpy(other + shifts))
    assert found.kl_mean == pytest.approx(by_formula(reference, other).kl_mean, rel=1e-9)


def test_top1_agreement_is_the_share_of_equal_largest_tokens() -> None:
    reference = torch.eye(4)
    other = torch.eye(4)[[0, 1, 3, 2]]
    assert compare(reference, other).top1_agreement == 0.5


def test_figures_of_float32_logits_are_computed_in_float64() -> None:
    """Of 50,257 tokens, nearly equal: float32 would lose a KL of 1e-9 in its rounding."""
    reference, other = drawn(2, 50_257, 3e-5, seed=1)
    expected = by_formula(reference, other).kl_mean
    assert 1e-10 < expected < 2e-9
    assert compare(float32(reference), float32(other)).kl_mean == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "other"])
def test_logits_that_are_no_numbers_are_refused(value: float, side: str) -> None:
    logits = {"reference": torch.zeros(2, 3), "other": torch.zeros(2, 3)}
    logits[side][1, 2] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        compare(logits["reference"], logits["other"])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes of how many positions each float64 copy is."""
    sizes: list[int] = []
    plain = Scores.__init__

    def counted(self: Scores, logits: torch.Tensor) -> None:
        sizes.append(len(logits))
        plain(self, logits)

    monkeypatch.setattr(Scores, "__init__", counted)
    return sizes


@pytest.mark.parametrize("positions", [511, 512, 513, 1300])
def test_many_positions_are_compared_in_pieces_with_the_figures_of_all(
    held: list[int], positions: int
) -> None:
    reference, other = drawn(positions, 31, 0.5)
    found, expected = compare(float32(reference), float32(other)), by_formula(reference, other)
    for name in FIGURES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=FLOAT64), name
    assert max(held) <= 512
    assert sum(held) == 2 * positions
    assert 1 not in held  # a sum over one position alone may be formed in another order


def test_the_quality_of_long_windows_is_measured_in_pieces(held: list[int]) -> None:
    """Three windows of 700 tokens, of which the second predicts nothing and the third not all."""
    T, V = 700, 31
    tables = {
        name: float32(logits).reshape(3, T, V) for name, logits in zip("fqp", drawn_three(), strict=True)
    }
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, V, (3, T)))
    targets[1], targets[2, 50:] = -1, -1
    models = {"float": lambda _: tables["f"], "parent": lambda _: tables["p"], "model": lambda _: tables["q"]}
    found = measure_quality(models, [(torch.zeros(3, T), targets)], {"model": "parent"})["model"]
    assert max(held) <= 512
    assert found.parity is not None
    assert found.parent is not None
    assert found.changes is not None
    counted = (targets >= 0).numpy()
    theirs, own, parent = (tables[name].double().numpy()[counted] for name in "fqp")
    for figures, expected in (
        (found.parity, by_formula(theirs, own)),
        (found.parent, by_formula(parent, own)),
    ):
        for name in FIGURES:
            assert getattr(figures, name) == pytest.approx(getattr(expected, name), rel=FLOAT64), name
    right = [log_softmax(each)[np.arange(len(each)), targets.numpy()[counted]] for each in (own, theirs)]
    assert found.window_losses == pytest.approx([-right[0][:T].sum(), 0.0, -right[0][T:].sum()], rel=FLOAT64)
    assert found.changes.probability == pytest.approx(np.exp(right[0]) - np.exp(right[1]), abs=FLOAT64)
    assert found.changes.kl == pytest.approx(kl(theirs, own), abs=FLOAT64)
    assert (found.changes.same_top == (theirs.argmax(-1) == own.argmax(-1))).all()


def drawn_three() -> tuple[Logits, Logits, Logits]:
    reference, other = drawn(2100, 31, 0.5)
    return reference, other, drawn(2100, 31, 0.2)[1]
